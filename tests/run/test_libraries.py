"""What a run imports, when, and what garbage collection has to do with it."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.run import libraries
from posttrain.run.libraries import load_libraries
from tests.conftest import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
# What a plain DPO run has no use for, though much of it is installed. `bitsandbytes` itself is
# there in name; its first submodule tells that it was loaded.
UNUSED = {
    "bitsandbytes.functional", "torch._inductor.compile_fx", "torch._inductor.lowering", "networkx",
    "trl", "vllm", "gguf", "scipy", "sklearn", "torchvision", "matplotlib", "tensorboard", "wandb",
    "torch.utils.tensorboard", "posttrain.rewards", "posttrain.rollouts", "posttrain.workers",
    "posttrain.models.quantised", "deepspeed",
}  # fmt: skip
# Runs a recipe as `python recipes/x.py` would, then lists all modules that it had loaded.
CHILD = """
import atexit, runpy, sys
atexit.register(lambda: print("LOADED", *sys.modules))
sys.argv = sys.argv[1:]
sys.path[0] = "recipes"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_plain_dpo_run_imports_nothing_that_it_does_not_use(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    pair = {"prompt": "5 6 7", "chosen": "8 9", "rejected": "10 11 12"}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    flags = {
        "model_name_or_path": tmp_path / "model",
        "dataset": tmp_path / "pairs.jsonl",
        "output_dir": tmp_path / "run",
        "template": "plain",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "recipes/dpo.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"LOADED", "transformers.trainer", "posttrain.trainers.preference"} <= loaded
    assert loaded & UNUSED == set()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that says, when it is loaded, whether garbage is collected."""
    (tmp_path / "some_library.py").write_text("import gc\ncollects = gc.isenabled()\n")
    (tmp_path / "broken_library.py").write_text("raise ImportError('no such driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("some_library", "broken_library"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("package")
def test_libraries_are_imported_without_collections_and_left_out_of_later_ones():
    load_libraries("some_library")
    assert not sys.modules["some_library"].collects
    assert gc.isenabled()
    assert not any(each is sys.modules["some_library"] for each in gc.get_objects())


@pytest.mark.usefixtures("package")
def test_garbage_is_collected_again_after_a_library_that_fails():
    with pytest.raises(ImportError, match="no such driver"):
        load_libraries("broken_library")
    assert gc.isenabled()


@pytest.mark.usefixtures("package")
def test_a_lazy_package_is_loaded_by_the_first_use_of_it(monkeypatch):
    monkeypatch.setattr(libraries, "LAZY", ("some_library", "broken_library", "absent_library"))
    load_libraries("json")
    import broken_library
    import some_library

    names = object.__getattribute__(some_library, "__dict__")
    assert "collects" not in names
    assert some_library.collects
    assert "collects" in names
    with pytest.raises(ImportError, match="no such driver"):
        broken_library.anything  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="absent_library"):
        import absent_library  # noqa: F401
