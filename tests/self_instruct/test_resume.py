"""A run that is killed, as a child process against a real server, and started again here."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import constants

from recipes import self_instruct
from tests.self_instruct.chat_server import Handler, serve, text

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret"
NUM_RECORDS = 40


def task_list(number: int) -> str:
    """Two tasks, different in every request."""
    items = [
        f"{i}. Instruction: Say alpha{number}x{i} beta{number}x{i} gamma{number}x{i}\n"
        f"{i}. Input:\n<noinput>\n{i}. Output:\ndone {number} {i}\n###\n"
        for i in (4, 5)
    ]
    return "".join(items)


class Answers:
    """Each prompt's own answer, slowly enough for a kill to fall between."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.prompts: list[str] = []  # in the order of their first arrival

    def __call__(self, handler: Handler) -> None:
        prompt = handler.server.asked[-1]["body"]["messages"][0]["content"]
        if prompt not in self.prompts:
            self.prompts.append(prompt)
        time.sleep(self.seconds)
        text(task_list(self.prompts.index(prompt)))(handler)


def settings(url: str, folder: Path) -> dict:
    return {
        "teacher_url": url,
        "concurrency": 2,
        "num_records": NUM_RECORDS,
        "output_dir": str(folder),
    }


def start(url: str, folder: Path) -> subprocess.Popen:
    flags = [word for name, value in settings(url, folder).items() for word in (f"--{name}", value)]
    command = [sys.executable, "recipes/self_instruct.py", *map(str, flags)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "TEACHER_API_KEY": KEY}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def start_again_here(url: str, folder: Path) -> str:
    """The same command within this process, which has loaded everything; returns what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(ROOT)
        patch.setenv("TEACHER_API_KEY", KEY)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        self_instruct.main(self_instruct.Config(**settings(url, folder)))
    return printed.getvalue()


def logged(folder: Path) -> list[dict]:
    path = folder / "requests.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed") / "run"
    with serve(default=Answers(seconds=0.05)) as server:
        child = start(server.url, folder)
        give_up = time.monotonic() + 60
        while len(logged(folder)) < 5 and time.monotonic() < give_up:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        before = logged(folder)
        with open(folder / "requests.jsonl", "a", encoding="utf-8") as log:
            log.write('{"key": "half of a li')
        arrived_before = len(server.asked)
        output = start_again_here(server.url, folder)
        arrived = [asked["body"]["messages"][0]["content"] for asked in server.asked]
        # The key comes from the environment; it must arrive here, and be written nowhere.
        assert {asked["headers"]["authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    return folder, before, arrived[:arrived_before], arrived[arrived_before:], output


def test_the_kill_came_in_the_middle(killed_and_resumed):
    _, before, _, arrived_after, _ = killed_and_resumed
    assert 5 <= len(before) < NUM_RECORDS // 2
    assert arrived_after


def test_what_was_answered_before_the_kill_is_not_asked_again(killed_and_resumed):
    _, before, _, arrived_after, output = killed_and_resumed
    answered = {line["request"]["prompt"] for line in before}
    assert not answered & set(arrived_after)
    assert f"({len(before)} from the log" in output
    assert "its last line was cut off by a kill" in output


def test_at_most_what_was_under_way_at_the_kill_is_asked_twice(killed_and_resumed):
    _, _, arrived_before, arrived_after, _ = killed_and_resumed
    twice = [prompt for prompt, n in Counter(arrived_before + arrived_after).items() if n > 1]
    assert len(twice) <= 2


def test_the_records_are_those_of_an_undisturbed_run(killed_and_resumed):
    folder, *_ = killed_and_resumed
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    names = [line["request"]["name"] for line in logged(folder)]
    assert sorted(names) == [f"tasks-{i:05d}" for i in range(len(names))]
    answers = {line["request"]["name"]: line["answer"]["text"] for line in logged(folder)}
    lines = [line for name in sorted(names) for line in answers[name].splitlines()]
    expected = [line.partition("done ")[2] for line in lines if line.startswith("done ")]
    assert [row["output"].removeprefix("done ") for row in rows] == expected
    assert len(rows) >= NUM_RECORDS


def test_the_key_is_in_no_file_of_the_run(killed_and_resumed):
    folder, *_ = killed_and_resumed
    for path in folder.rglob("*"):
        assert KEY not in path.read_text(encoding="utf-8"), path
