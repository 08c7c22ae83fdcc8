"""Compare methods of fine-tuning: same base, task, budget and seeds, side by side; ends with a recommendation.

Finished runs are kept, interrupted ones go on: run the same command again, also with more methods or seeds.
"""

from __future__ import annotations

from robot_rl.rl.compare.run import Config

__all__ = ["Config", "resume_hint", "run"]


def run(config: Config) -> int:
    """Compare, print the figures and what they mean, and write the page; 1 if a method failed."""
    from robot_rl.report.comparison import cells_of, render_comparison
    from robot_rl.report.comparison_picture import write_comparison_picture
    from robot_rl.rl.compare.run import Comparison
    from robot_rl.train.progress import say
    from robot_rl.train.run import to_plain, versions, write_text

    comparison = Comparison(config)
    results = comparison.execute()
    title = f"Fine-tuning compared: {config.task}"
    facts = {"Settings": to_plain(config), "Versions": versions(), "Machine": results["machine"]}
    page = render_comparison(results, title=title, commands=[command(config)], facts=facts)
    write_text(config.out / "compare.html", page)
    write_comparison_picture(results, config.out / "compare.png", title)
    say()
    for row in results["methods"]:
        method, seeds, success, interval, _, gain, steps, minutes, _ = cells_of(row)
        say(f"{method:<22} {success:>8}  {interval:<18} gain {gain:<24} {seeds} seed(s), {steps} steps, {minutes} min")
    say()
    for line in results["recommendation"]:
        say(line, style="bold" if line is results["recommendation"][0] else None)
    say(f"Report: {config.out / 'compare.html'}", style="bold")
    return int(any(row["error"] for row in results["methods"]))


def resume_hint(config: Config) -> str:
    """Say how an interrupted comparison goes on."""
    return f"What is finished is kept in {config.out}. Continue with: {command(config)}"


def command(config: Config) -> str:
    """Return the command line of ``config``, without settings that have their defaults."""
    from robot_rl.cli import main

    return main.command("compare", config)
