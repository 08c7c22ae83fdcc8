"""The doctor: finds the installation healthy, and names what is not, with a remedy."""

import sys
from types import SimpleNamespace

import pytest

from robot_rl.cli import doctor


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "_matmul_gflops", lambda dtype, size=0: 1.0)


def test_this_installation_is_healthy(quick, capsys):
    assert doctor.run(doctor.Config()) == 0
    output = capsys.readouterr().out
    assert "H.264 written and read back" in output
    assert "isaac gym" in output
    assert " 0 failed" in output


def test_old_and_missing_packages_fail_with_a_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "MINIMUM", {"numpy": (99, 0), "no-such-package": (1,)})
    old, missing = doctor._versions()
    assert (old.verdict, missing.verdict) == ("fail", "fail")
    assert old.remedy == "99.0 or newer is needed: pip install -U numpy"
    assert missing.detail == "not installed"


def test_a_shadowed_package_is_named(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "packages_distributions", lambda: {"hardware": ["robot-rl", "hardware"]})
    findings = {finding.subject: finding for finding in doctor._packages()}
    assert findings["package sim"].verdict == "ok"
    assert findings["package hardware"].verdict == "fail"
    assert "also installed by hardware" in findings["package hardware"].detail
    assert "pip uninstall hardware" in findings["package hardware"].remedy


def test_a_package_from_elsewhere_is_named(monkeypatch, tmp_path):
    elsewhere = SimpleNamespace(origin=str(tmp_path / "sim" / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: elsewhere)
    assert {finding.verdict for finding in doctor._packages()} == {"fail"}


def test_a_check_that_breaks_is_a_finding_and_hides_nothing(quick, monkeypatch, capsys):
    def broken():
        raise RuntimeError("no codec")
        yield

    broken.__name__ = "_video"
    monkeypatch.setattr(doctor, "_video", broken)
    assert doctor.run(doctor.Config()) == 1
    output = capsys.readouterr().out
    assert "fail  video             RuntimeError: no codec" in output
    assert "disk" in output


def test_absent_ros_is_a_warning_with_a_remedy(monkeypatch):
    from hardware.cli import checks

    monkeypatch.setitem(sys.modules, "rclpy", None)
    ((verdict, subject, detail, remedy),) = checks.ros()
    assert (verdict, subject) == ("warn", "ros 2")
    assert "one process" in detail
    assert "[ros]" in remedy


def test_a_gpu_is_listed_with_what_uses_it(quick, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    (gpu,) = (finding for finding in doctor._torch() if finding.subject == "gpu")
    assert gpu.detail == "Some GPU; networks run on it with --device cuda"
