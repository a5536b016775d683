"""What Slurm says of a job, by its own commands."""

from __future__ import annotations

import subprocess


def command_output(*command: str) -> str | None:
    """Return the standard output of a command; None where it fails or there is no answer within a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def job_fields(job: str) -> dict[str, str]:
    """Return a job as the controller has it, while it remembers: JobState, ExitCode, PreemptTime and so on."""
    text = command_output("scontrol", "--oneliner", "show", "job", job) or ""
    return dict(w.split("=", 1) for w in text.split() if "=" in w)


def job_state(job: str) -> tuple[str, str]:
    """Return a job's state and exit code, from the controller while it remembers, then from accounting where there is
    any.

    A job that ended by itself in the grace time of its preemption is FAILED to Slurm; here it is PREEMPTED.
    """
    if words := job_fields(job):
        state = words.get("JobState", "")
        if state in ("FAILED", "TIMEOUT") and _is_preempted(words):
            state = "PREEMPTED"
        return state, words.get("ExitCode", "?")
    text = command_output(
        "sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode"
    )
    if text and "|" in text:
        state, code = text.split("\n")[0].split("|")[:2]
        return state, code
    return "", ""


def is_being_preempted(job: str) -> bool:
    """Whether a job still runs, in the grace time that its preemption leaves it."""
    words = job_fields(job)
    return words.get("JobState") == "RUNNING" and _is_preempted(words)


def _is_preempted(words: dict[str, str]) -> bool:
    return words.get("PreemptTime", "None") not in ("None", "Unknown")
