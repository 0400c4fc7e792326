"""The watching callback: on by default, on the main process, over the run's own log lines."""

from posttrain.rewards.call import Scoring
from posttrain.run.folder import read_log
from posttrain.trainers.fit import ProgressCallback
from posttrain.trainers.rl import WatchCallback
from tests.trainers.tiny import change_rollouts, even_share, logged, make_trainer


def same(completions, **_):
    return [1.0] * len(completions)


def a_run(folder, **settings):
    here = Scoring(num_workers=0)  # in this process: none has to import this module first
    return make_trainer("rl", folder, max_steps=4, trainer={"scoring": here, **settings})


def test_a_run_without_anything_to_learn_says_so_once_and_counts_it(tmp_path, capsys):
    """Of its random completions more than a fifth are cut, too."""
    trainer = a_run(tmp_path, rewards={"same": (same, 1.0)})
    trainer.add_callback(ProgressCallback(tmp_path))
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert sum("no gradient: loss and gradient are exactly 0" in line for line in lines) == 1
    assert sum("groups of equal rewards: in 100%" in line for line in lines) == 1
    written = [line for line in read_log(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["warnings"] for line in written] == [1, 3, 3, 3]
    assert lines[-1] == (
        "warnings of 4 log lines: no gradient on 4, groups of equal rewards on 3, "
        "truncated answers on 3"
    )


def test_the_first_update_of_a_rollout_is_on_policy_and_only_it_is_measured(tmp_path):
    trainer = a_run(tmp_path, updates_per_rollout=2)
    trainer.train()
    assert logged(trainer, "ratio_outside") == [0.0, 0.0]


def test_a_sampler_with_other_weights_is_noticed_at_the_first_update(tmp_path, capsys):
    trainer = a_run(tmp_path)

    def off(completion):
        completion.logps[:] = [logp - 0.2 for logp in completion.logps]

    change_rollouts(trainer, off)
    trainer.train()
    assert min(logged(trainer, "ratio_outside")) == 1.0
    assert "ratio at the first update: before any update 100% of the tokens" in (
        capsys.readouterr().out
    )


def test_the_first_reward_is_the_one_that_counts_however_heavy_a_penalty_is(tmp_path):
    trainer = a_run(tmp_path, rewards={"even": (even_share, 1.0), "penalty": (same, 3.0)})
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, WatchCallback))
    assert callback.rewards[0] == "even"


def test_other_processes_are_silent(tmp_path, capsys, monkeypatch):
    trainer = a_run(tmp_path, rewards={"same": (same, 1.0)})
    monkeypatch.setattr(type(trainer.state), "is_world_process_zero", False, raising=False)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, WatchCallback))
    callback.on_train_begin(None, trainer.state, None)
    trainer.state.is_world_process_zero = False
    line = {"loss": 0.0, "grad_norm": 0.0}
    callback.on_log(None, trainer.state, None, logs=line)
    callback.on_train_end(None, trainer.state, None)
    assert capsys.readouterr().out == ""
    assert line == {"loss": 0.0, "grad_norm": 0.0}
