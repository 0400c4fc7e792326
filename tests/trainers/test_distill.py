"""Distillation: exact, whatever the cutting, resumed as if nothing had been, and it learns."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.errors import ConfigError, DataError
from posttrain.losses import (
    generalised_jsd,
    generalised_jsd_with_slope,
    minillm_advantages,
    reverse_kl_advantages,
    top_k_kl_with_slope,
)
from posttrain.models.load import load_model
from posttrain.packed import divergence
from posttrain.packed.half import multiplier
from posttrain.packed.prepare import prepare
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.run.checkpoints import newest_whole_checkpoint
from posttrain.trainers.distill import Distillation, DistillTrainer, completed, prompt_of
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.teachers import (
    AdapterOff,
    ModelTeacher,
    TextTeacher,
    TopKTeacher,
    check_recorded,
    spans_of,
)
from tests.conftest import EOS, make_model, make_tokenizer
from tests.trainers.test_resume import stopped_at_2
from tests.trainers.tiny import Config, arguments, documents, logged, prompts, weights

SAMPLING = Sampling(10, (EOS, 2, 3, 4, 5), temperature=0.9)
JSD = partial(generalised_jsd_with_slope, beta=0.3)
PLANS = {
    "gkd": Distillation(JSD, nll_weight=0.2, on_policy=0.5, sampling=SAMPLING),
    "minillm": Distillation(
        partial(generalised_jsd_with_slope, beta=1),
        minillm_advantages,
        on_policy=1,
        sampling=SAMPLING,
    ),
    "on_policy": Distillation(None, reverse_kl_advantages, on_policy=1, sampling=SAMPLING),
}


def make_teacher(seed=1):
    model = make_model(seed=seed)
    prepare(model)
    return ModelTeacher(model)


def trainer_of(folder, plan, *, model=None, teacher=None, args=None, **settings):
    own = {"documents": documents(), "tokenizer": make_tokenizer()}
    own |= {k: settings.pop(k) for k in ("documents", "max_tokens_per_microbatch") if k in settings}
    args = args or arguments(folder, **{"per_device_train_batch_size": 8, **settings})
    teacher = teacher or make_teacher()
    return DistillTrainer(model or make_model(), args, teacher=teacher, plan=plan, **own)


def test_the_first_step_is_the_plain_computation_with_all_the_logits(tmp_path):
    """Loss and gradient norm of two plain models, document by document, without padding."""
    student, teacher = make_model(seed=0), make_model(seed=1)
    rows, total = documents(8), 0
    for row in rows:
        ids, trained = torch.tensor([row["input_ids"]]), torch.tensor(row["trained"][1:])
        one, other = (m(ids).logits[0, :-1][trained].log_softmax(-1) for m in (student, teacher))
        nll = -one.gather(-1, ids[0, 1:][trained][:, None]).sum()
        total = total + generalised_jsd(one, other.detach(), beta=0.3).sum() + 0.2 * nll
    loss = total / sum(sum(row["trained"]) for row in rows)
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    trainer = trainer_of(
        tmp_path, Distillation(JSD, nll_weight=0.2), documents=rows, max_steps=1, max_grad_norm=1e9
    )
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), abs=1e-5)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(norm.item(), rel=1e-5)


def test_a_teachers_head_is_laid_out_once_in_a_run(tmp_path, monkeypatch):
    made = []

    def counted(weight):
        made.append(weight)
        return multiplier(weight)

    monkeypatch.setattr(divergence, "multiplier", counted)
    teacher = make_teacher()
    trainer = trainer_of(tmp_path, PLANS["gkd"], teacher=teacher, max_tokens_per_microbatch=64)
    trainer.train()
    head = teacher.model.get_output_embeddings().weight
    assert len(made) > 6  # the student's, in each micro-batch
    assert sum(weight.data_ptr() == head.data_ptr() for weight in made) == 1


@pytest.mark.parametrize("name", PLANS)
def test_how_a_batch_is_cut_changes_nothing(name, tmp_path):
    """Micro-batches of 40 tokens, and two accumulation steps, with completions by the student."""
    plan = PLANS[name]
    whole = trainer_of(tmp_path / "whole", plan)
    cut = trainer_of(
        tmp_path / "cut", plan, max_tokens_per_microbatch=40, gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    for trainer in (whole, cut):
        trainer.train()
    assert (weights(whole.model) - weights(cut.model)).abs().max() < 1e-5
    assert logged(whole, "loss") == pytest.approx(logged(cut, "loss"), abs=1e-5)
    assert logged(whole, "on_policy") == logged(cut, "on_policy")
    assert (weights(whole.model) - weights(make_model())).abs().max() > 1e-3


@pytest.mark.parametrize("name", PLANS)
def test_a_resumed_run_ends_with_the_same_weights_and_losses(name, tmp_path):
    def run(folder, **settings):
        config = Config(
            output_dir=str(folder), per_device_train_batch_size=8, save_steps=2, **settings
        )
        trainer = trainer_of(folder, PLANS[name], args=training_arguments(config))
        fit(trainer, config)
        return trainer

    whole = run(tmp_path / "whole")
    stopped = stopped_at_2(tmp_path / "whole", tmp_path / "stopped")
    assert newest_whole_checkpoint(stopped / "checkpoints").name == "checkpoint-2"
    resumed = run(stopped, resume=True)
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert logged(whole, "loss") == logged(resumed, "loss")


FALLS = {"gkd": "divergence", "minillm": "divergence", "on_policy": "kl"}


@pytest.mark.parametrize("name", PLANS)
def test_the_student_comes_nearer_to_its_teacher(name, tmp_path):
    """On completions that it has not seen, many of them: the estimate of the KL is noisy."""
    trainer = trainer_of(
        tmp_path, PLANS[name], documents=documents(320), max_steps=10,
        per_device_train_batch_size=32,
    )  # fmt: skip
    trainer.train()
    first, last = (logged(trainer, FALLS[name])[part] for part in (slice(2), slice(-2, None)))
    assert sum(last) < 0.93 * sum(first)


def test_a_student_that_is_its_teacher_learns_nothing(tmp_path):
    plan = Distillation(JSD)
    trainer = trainer_of(tmp_path, plan, teacher=make_teacher(seed=0), max_steps=1)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(0, abs=1e-5)


def test_prompts_alone_serve_where_the_student_writes_all_completions(tmp_path):
    trainer = trainer_of(tmp_path, PLANS["on_policy"], documents=prompts(), max_steps=1)
    trainer.train()
    assert logged(trainer, "on_policy") == [1]
    with pytest.raises(DataError, match="document 0: expected at least one trained token"):
        trainer_of(tmp_path, PLANS["gkd"], documents=prompts())


def test_the_prompt_of_a_conversation_goes_up_to_its_last_answer():
    example = {"row": 3, "input_ids": [5, 6, 7, 8, 9, 1], "trained": [0, 1, 0, 0, 1, 1]}
    example["trained"] = [bool(x) for x in example["trained"]]
    assert prompt_of(example) == [5, 6, 7, 8]
    made = completed(example, prompt_of(example), Completion([2, 1], [-0.5, -0.1], [], "stop"))
    assert made["input_ids"] == [5, 6, 7, 8, 2, 1]
    assert made["trained"] == [False] * 4 + [True] * 2
    assert made["policy_logps"] == [-0.5, -0.1]


# Teachers.


def test_an_adapter_that_is_off_is_the_teacher_of_the_one_that_learns(base, tmp_path):
    config = Config(
        model_name_or_path=str(base), output_dir=str(tmp_path), max_steps=3, use_peft=True,
        lora_r=4, per_device_train_batch_size=8,
    )  # fmt: skip
    model = load_model(config, quiet=True)
    trainer = trainer_of(
        tmp_path, Distillation(JSD, nll_weight=0.5), model=model, teacher=AdapterOff(),
        args=training_arguments(config),
    )  # fmt: skip
    fit(trainer, config)
    first, *_, last = logged(trainer, "divergence")
    assert first == pytest.approx(0, abs=1e-7)
    assert last > 1e-5
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()


def test_an_adapter_off_that_could_teach_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected --use_peft"):
        trainer_of(tmp_path, Distillation(JSD, nll_weight=1.0), teacher=AdapterOff())


def recorded(count=8, k=97):
    """Rows with the top k of the teacher of seed 1."""
    teacher, rows = make_model(seed=1), []
    for row in documents(count):
        logps = teacher(torch.tensor([row["input_ids"]])).logits[0].detach().log_softmax(-1)
        places = [i - 1 for i, trained in enumerate(row["trained"]) if trained]
        top, ids = logps[places].topk(k)
        rows.append({**row, "top_ids": ids.tolist(), "top_logps": top.tolist()})
    return rows


def test_the_whole_vocabulary_recorded_is_the_teacher_itself(tmp_path):
    """And a few of its tokens are less, in a loss that still falls."""
    rows, found = recorded(), {}
    found["model"] = trainer_of(
        tmp_path, Distillation(partial(generalised_jsd_with_slope, beta=0)),
        documents=Dataset.from_list(rows), max_steps=3,
    )  # fmt: skip
    plan = Distillation(top_k_kl_with_slope)
    for name, k in (("all", 97), ("few", 4)):
        few = [
            {**row, **{c: [x[:k] for x in row[c]] for c in ("top_ids", "top_logps")}}
            for row in rows
        ]
        found[name] = trainer_of(
            tmp_path, plan, teacher=TopKTeacher(), documents=Dataset.from_list(few), max_steps=3,
            max_tokens_per_microbatch=60,
        )  # fmt: skip
    losses = {}
    for name, trainer in found.items():
        trainer.train()
        losses[name] = logged(trainer, "loss")
    assert losses["all"] == pytest.approx(losses["model"], abs=1e-4)
    assert losses["few"][0] < losses["all"][0]
    assert losses["few"][-1] < losses["few"][0]


def test_a_server_is_asked_about_what_is_not_recorded(tmp_path):
    asked = []

    def ask(examples):
        asked.extend(examples)
        top = [{"top_ids": [[5, 6]], "top_logps": [[-0.7, -0.8]]} for _ in examples]
        return [
            {**e, **{name: values * sum(e["trained"]) for name, values in t.items()}}
            for e, t in zip(examples, top, strict=True)
        ]

    plan = Distillation(top_k_kl_with_slope, on_policy=0.5, sampling=Sampling(6, (EOS,)))
    trainer = trainer_of(tmp_path, plan, teacher=TopKTeacher(ask), max_steps=6)
    trainer.train()
    assert len(asked) == 48
    assert 12 < sum("policy_logps" in example for example in asked) < 36
    first, *_, last = logged(trainer, "loss")
    assert last < first


BROKEN = {
    "no 'top_ids'": {"top_ids": None},
    "for each of 2 trained": {"top_ids": [[1]]},
    "as many top_logps as top_ids": {"top_ids": [[1, 2], [3]]},
    "different ids below 97": {"top_ids": [[1], [97]]},
    "add up to 1 at most": {"top_logps": [[-0.1], [0.2]]},
}


@pytest.mark.parametrize("message", BROKEN)
def test_recorded_rows_that_cannot_be_right_are_refused_with_their_row(message):
    row = {"input_ids": [4, 5, 6], "trained": [False, True, True]}
    row |= {"top_ids": [[1], [3]], "top_logps": [[-0.1], [-0.2]]}
    check_recorded([row], 97, "data.jsonl")
    with pytest.raises(DataError, match=f"data.jsonl, row 2: .*{message}"):
        check_recorded([row, {**row, **BROKEN[message]}], 97, "data.jsonl")


def test_recorded_log_probs_say_nothing_of_the_students_own_completions(tmp_path):
    plan = Distillation(top_k_kl_with_slope, on_policy=0.5, sampling=SAMPLING)
    with pytest.raises(ConfigError, match="nobody can be asked"):
        trainer_of(tmp_path, plan, teacher=TopKTeacher())


# A teacher with another tokenizer.


def word_tokenizer():
    """Token i is the word "ti", and the end of a sequence no part of any."""
    ids = {"<pad>": 0, "</s>": EOS} | {f"t{i}": i for i in range(2, 97)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")


def character_tokenizer():
    """One token for each character of those words, with ids that are not the student's."""
    ids = {"</s>": 0, "?": 1} | {c: i + 2 for i, c in enumerate("0123456789 t<pad>")}
    characters = Tokenizer(models.WordLevel(ids, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="</s>")


TEXTS = replace(PLANS["on_policy"], sampling=replace(SAMPLING, stop_ids=(EOS,)))


def test_spans_are_cut_where_both_have_the_end_of_a_token():
    assert spans_of([2, 5, 6], [1, 2, 6]) == [([0], [0, 1]), ([1, 2], [2])]
    assert spans_of([3, -1, 7], [7]) == [([0, 1, 2], [0])]
    assert spans_of([], []) == []


def test_a_teacher_with_the_same_tokenizer_gives_the_same_by_text_as_by_tokens(tmp_path):
    """Numbers of one word each: every token is a span."""
    found = []
    for kind in ("tokens", "text"):
        teacher = make_teacher()
        if kind == "text":
            teacher = TextTeacher(teacher.model, word_tokenizer(), word_tokenizer())
        trainer = trainer_of(tmp_path, TEXTS, teacher=teacher, max_steps=2)
        trainer.train()
        found.append(logged(trainer, "loss") + logged(trainer, "kl"))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_of_another_tokenizer_the_log_prob_of_the_text_is_shared_among_the_tokens(tmp_path):
    """The sum over the student's tokens is the teacher's over its own, computed apart."""
    characters, plain = character_tokenizer(), make_model(seed=1, vocab_size=24)
    model = make_model(seed=1, vocab_size=24)
    prepare(model)
    teacher = TextTeacher(model, characters, word_tokenizer())
    trainer = trainer_of(tmp_path, TEXTS, teacher=teacher, max_steps=1)
    (example,) = trainer._ready([trainer.train_dataset[0]])
    logps = teacher.logps(trainer, trainer._pack([example]), [example], None)
    prompt, ids = example["teacher_prompt"], example["teacher_ids"]
    written = [i for i in example["input_ids"][-len(logps) :] if i != EOS]
    assert characters.decode([i for i in ids if i]) == word_tokenizer().decode(written)
    logits = plain(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = (logits / SAMPLING.temperature).log_softmax(-1)
    expected = expected.gather(-1, torch.tensor(ids)[:, None]).sum()
    assert len(ids) > len(logps)
    torch.testing.assert_close(logps.sum(), expected.detach(), rtol=1e-4, atol=1e-4)
    trainer.train()
    assert weights(trainer.model).isfinite().all()


def test_distributions_of_two_tokenizers_are_not_compared(tmp_path):
    teacher = TextTeacher(make_teacher().model, character_tokenizer(), make_tokenizer())
    with pytest.raises(ConfigError, match="--method on_policy, which compares texts"):
        trainer_of(tmp_path, PLANS["gkd"], teacher=teacher)


PLANS_REFUSED = [
    ({}, "a divergence or an advantage"),
    ({"advantage": minillm_advantages}, "expected on_policy 1"),
    ({"divergence": JSD, "on_policy": 0.5}, "temperature above 0"),
    ({"divergence": JSD, "on_policy": 1, "sampling": SAMPLING, "nll_weight": 1}, "there are none"),
    ({"divergence": JSD, "sampling": Sampling(3, (1,), top_k=2)}, "the whole distribution"),
]


@pytest.mark.parametrize(("settings", "message"), PLANS_REFUSED)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(**settings)
