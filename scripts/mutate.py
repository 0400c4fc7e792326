"""How many deliberate faults do the tests catch?

    python scripts/mutate.py                        # all faults of mutations.jsonl, in some minutes
    python scripts/mutate.py --only 'kl|clip'       # those whose id matches
    python scripts/mutate.py --tree ../other        # of another checkout

A line of mutations.jsonl is one fault: `find` stands exactly once in posttrain/**/*.py, in
whichever file that is by now, `replace` takes its place, and `breaks` says what is wrong then. Each
is put into a copy of the tree, never into the tree itself. There the tests are run that import the
changed module, by its name or from a package that hands on its names, and then those that import a
module which imports it, until one fails or the time is up. A failure counts if the same test passes
on an unchanged copy. Tests that start several processes are left out where there are others. Heavy
libraries are loaded once, and each fault is tried in a fork. Exits with 1 unless all are caught.
"""

import argparse
import ast
import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

HERE = Path(__file__).parent
PACKAGE = "posttrain"
DEADLINE_SECONDS = 240
NOT_COPIED = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "runs", "build")
SEVERAL_PROCESSES = re.compile(r"run_ranks|commands\.launch|torchrun")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")
SETTINGS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
# What most tests need, and nothing that starts threads: those would be lost in a fork.
HEAVY = (
    "transformers.trainer", "transformers.models.auto.modeling_auto", "peft", "datasets",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
    "transformers.integrations.deepspeed", "trl.chat_template_utils", "sympy", "math_verify",
    "rapidfuzz.process", "rich.progress", "tyro", "hypothesis", "beartype", "jaxtyping", "pytest",
)  # fmt: skip


class Mutation(NamedTuple):
    """A fault; see the module."""

    id: str
    find: str
    replace: str
    breaks: str


class Outcome(NamedTuple):
    """Of a run of tests: passed, failed (by `test`), late, or broken (pytest gave no verdict)."""

    status: str
    num_passed: int = 0
    test: str = ""


class Recorder:
    """A pytest plugin that writes one line for each test, at once, so that a kill loses nothing."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8", buffering=1)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or (report.passed and getattr(report, "when", "") == "call"):
            self.file.write(f"{report.outcome} {report.nodeid}\n")

    pytest_collectreport = pytest_runtest_logreport  # a file that cannot be loaded


class Imports:
    """Which modules of ours each file imports; these, by path, are the package's and the tests'."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.tests = sorted((tree / "tests").rglob("test_*.py"))
        files = [*(tree / PACKAGE).rglob("*.py"), *(tree / "tests").rglob("*.py")]
        self.modules = {self._name(path): path for path in files if path.name != "conftest.py"}
        packages = {n: path for n, path in self.modules.items() if path.name == "__init__.py"}
        # For each package: an imported name -> the module that it comes from.
        self.exports = {n: {x: m for m, x in self._imported(path)} for n, path in packages.items()}
        self.of = {path: self._modules(path) for path in self.modules.values()}

    def tests_for(self, module: Path) -> list[Path]:
        """The tests that reach the module, at most through one other; the likeliest first."""
        users = [path for path in self.modules.values() if module in self.of[path]]
        near = {module} | {path for path in users if path.name != "__init__.py"}
        found = [test for test in self.tests if self.of[test] & near]
        single = [test for test in found if not SEVERAL_PROCESSES.search(test.read_text("utf-8"))]
        return sorted(single or found, key=functools.partial(self._distance, module))

    def _distance(self, module: Path, test: Path) -> tuple[bool, bool, bool, int]:
        """Not the module's own; through another; not of its folder; how much it imports."""
        folders = {"_".join(p.relative_to(self.tree).parts[1:-1]) for p in (module, test)}
        is_beside = len(folders) == 1  # also tests/data_hygiene of data/hygiene
        is_own = test.stem == f"test_{module.stem}" and is_beside
        return not is_own, module not in self.of[test], not is_beside, len(self.of[test])

    def _name(self, path: Path) -> str:
        return ".".join(path.relative_to(self.tree).with_suffix("").parts).removesuffix(".__init__")

    def _imported(self, path: Path) -> list[tuple[str, str]]:
        """(module or package, name that is imported from it or "") of every import of ours."""
        package = self._name(path if path.name == "__init__.py" else path.parent)
        found = []
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found += [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                found += [(base, alias.name) for alias in node.names]
        return [entry for entry in found if entry[0].split(".")[0] in (PACKAGE, "tests")]

    def _modules(self, path: Path) -> set[Path]:
        found: set[str] = set()
        for base, name in self._imported(path):
            whole = f"{base}.{name}" if f"{base}.{name}" in self.modules else base
            exports = self.exports.get(whole, {})
            found |= {whole, exports[name]} if name in exports else {whole, *exports.values()}
        return {self.modules[name] for name in found if name in self.modules}


class Trial:
    """Tries faults of one tree in copies of it, below an empty folder; see the module."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.clean, self.copy, self.results = folder / "clean", folder / "copy", folder / "results"
        shutil.copytree(tree, self.clean, symlinks=True, ignore=NOT_COPIED)
        (folder / "shared").symlink_to(tree.parent / "shared")  # where some tests look for data
        self.imports = Imports(self.clean)
        modules = (self.clean / PACKAGE).rglob("*.py")
        self.texts = {path: path.read_text("utf-8") for path in modules}
        self.passes_clean: dict[str, bool] = {}

    def judge(self, mutation: Mutation, path: Path) -> tuple[Outcome, list[str]]:
        """What the tests say of the fault, and which files these were."""
        changed = self.texts[path].replace(mutation.find, mutation.replace)
        found = self.imports.tests_for(path)
        tests = [str(test.relative_to(self.clean)) for test in found]
        while tests:
            skipped = [f"--deselect={t}" for t, passes in self.passes_clean.items() if not passes]
            outcome = self._run([*tests, *skipped], {path.relative_to(self.clean): changed})
            if outcome.status != "failed" or self._passes(outcome.test):
                return outcome, tests
            if f"--deselect={outcome.test}" in skipped:  # pytest does not know it by this name
                break
            tests = [test for test in tests if test != outcome.test]  # a file that does not load
        return Outcome("broken"), tests

    def _passes(self, test: str) -> bool:
        """Does the test pass on the unchanged tree?"""
        if test not in self.passes_clean:
            self.passes_clean[test] = self._run([test], {}).status == "passed"
            if not self.passes_clean[test]:
                print(f"\n        left out, fails on the unchanged tree: {test}", flush=True)
        return self.passes_clean[test]

    def _run(self, arguments: list[str], changed: dict[Path, str]) -> Outcome:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.clean, self.copy, symlinks=True)
        for path, text in changed.items():
            (self.copy / path).write_text(text, "utf-8")
        child = os.fork()
        if child == 0:
            _run_pytest(self.copy, arguments, self.results)
        timer = threading.Timer(DEADLINE_SECONDS, os.killpg, (child, signal.SIGKILL))
        timer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        timer.cancel()
        timer.join()
        with contextlib.suppress(ProcessLookupError):  # what the tests left running
            os.killpg(child, signal.SIGKILL)
        lines = self.results.read_text("utf-8").splitlines()
        failed = [line.partition(" ")[2] for line in lines if line.startswith("failed ")]
        if failed:
            return Outcome("failed", len(lines) - len(failed), failed[0])
        return Outcome({0: "passed", -signal.SIGKILL: "late"}.get(status, "broken"), len(lines))


def _run_pytest(tree: Path, arguments: list[str], results: Path) -> NoReturn:
    """The forked child, in a process group of its own."""
    code = 1
    try:
        recorder = Recorder(results)
        os.setsid()
        for stream in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        os.chdir(tree)
        sys.path[0] = os.environ["PYTHONPATH"] = str(tree)
        if Path(importlib.util.find_spec(PACKAGE).origin).is_relative_to(tree):
            code = int(sys.modules["pytest"].main([*OPTIONS, *arguments], plugins=[recorder]))
    finally:
        os._exit(code)


def report(trial: Trial, mutation: Mutation) -> str:
    """Try the fault and print what became of it; its kind."""
    begun, texts = time.monotonic(), trial.texts.items()
    places = [path for path, text in texts for _ in range(text.count(mutation.find))]
    if len(places) != 1:
        where = ", ".join(str(path.relative_to(trial.clean)) for path in places) or "nowhere"
        print(f"UNTRIED  its text is found {len(places)} times: {where}", flush=True)
        return "UNTRIED"
    outcome, tests = trial.judge(mutation, places[0])
    run = f"{outcome.num_passed} tests passed in {' '.join(tests) or 'no file'}"
    kind, text = {
        "failed": ("caught", f"by {outcome.test}"),
        "passed": ("MISSED", f"{mutation.breaks}\n        {run}"),
        "late": ("MISSED", f"{mutation.breaks}\n        out of time: {run}"),
        "broken": ("UNTRIED", f"pytest gave no verdict: {run}"),
    }[outcome.status]
    seconds, where = time.monotonic() - begun, places[0].relative_to(trial.clean)
    print(f"{kind:7} {seconds:5.1f} s  {where}  {text}", flush=True)
    return kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="of ids, as a regex")
    parser.add_argument("--tree", type=Path, default=HERE.parent, metavar="DIR")
    options = parser.parse_args()
    lines = (HERE / "mutations.jsonl").read_text("utf-8").splitlines()
    chosen = [m for m in map(json.loads, lines) if re.search(options.only, m["id"])]
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    sys.dont_write_bytecode = True
    for name in HEAVY:
        importlib.import_module(name)
    counts = dict.fromkeys(("caught", "MISSED", "UNTRIED"), 0)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(options.tree.resolve(), Path(folder).resolve())
        for number, fault in enumerate(chosen, 1):
            print(f"[{number:2}/{len(chosen)}] {fault['id']:34}", end=" ", flush=True)
            counts[report(trial, Mutation(**fault))] += 1
    numbers = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    print(f"{numbers} of {len(chosen)}; {sum(os.times()[:4]):.0f} s of CPU time")
    sys.exit(counts["caught"] < len(chosen))


if __name__ == "__main__":
    main()
