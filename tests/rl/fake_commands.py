"""Stands in for ``robot-rl`` in tests of comparisons: same arguments and files, no learning.

The behaviour follows from the method's name; ``events.jsonl`` beside the comparison says what ran when.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(verb, arguments):
    given = {}
    for word in arguments:
        if word.startswith("--"):
            name = word
            given[name] = []
        else:
            given[name].append(word)
    one = {name: values[0] for name, values in given.items() if values}
    if verb == "eval":
        evaluate(Path(one["--policy"]), int(one["--episodes"]), Path(one["--json"]))
    else:
        finetune(one["--method"], int(one["--seed"]), Path(one["--out"]), given)


def evaluate(policy, episodes, result):
    rate = json.loads((policy / "policy.json").read_text())["rate"]
    success = [k < round(rate * episodes) for k in range(episodes)]
    result.write_text(json.dumps({"per_episode": {"success": success}}))


def finetune(method, seed, out, given):
    out.mkdir(parents=True, exist_ok=True)
    attempts = out / "attempts"
    attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
    first = len(attempts.read_text()) == 1
    log = out.parents[2] / "events.jsonl"
    begun = {"run": f"{method} {seed}", "start": time.time(), "cores": len(os.sched_getaffinity(0))}
    begun |= {"threads": os.environ["OMP_NUM_THREADS"], "resume": "--resume" in given, "given": given}
    if method == "broken" and first:
        sys.stderr.write("some progress\nThe method cannot do this. It can do that.\n")
        sys.exit(2)
    if method == "killed" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60 if method == "slow" and first else 0.3)
    rate = {"good": 0.9, "fair": 0.7, "bad": 0.1}.get(method, 0.5) + 0.02 * seed
    with (out / "metrics.jsonl").open("w") as file:
        for k in range(3):
            row = {"step": 100 * k, "seconds": 1.0 + k, "success": 0.5 + (rate - 0.5) * k / 2}
            file.write(json.dumps({"stage": "eval", **row}) + "\n")
            file.write(json.dumps({"stage": "finetune", "step": 100 * (k + 1), "seconds": 2.0 + k}) + "\n")
    best = out / "checkpoints" / "best"
    best.mkdir(parents=True, exist_ok=True)
    (best / "policy.json").write_text(json.dumps({"rate": rate}))
    (best / "model.safetensors").write_bytes(b"")
    with log.open("a") as file:
        file.write(json.dumps(begun | {"end": time.time()}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
