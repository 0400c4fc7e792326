"""Language consistency: the golden case, what a word is, whose it is, and time."""

import subprocess
import sys
import unicodedata
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import ConfigError
from posttrain.rewards.call import Scoring, score
from posttrain.rewards.checks import check_rewards, find_unscorable
from posttrain.rewards.language import (
    LANGUAGES,
    MAX_CHARS,
    check_language,
    language_consistency,
    language_reward,
    language_share,
)
from tests.cases import read_cases
from tests.deadline import deadline

REASONING = {
    case["language"]: case["text"] for case in read_cases(__file__, "language", kind="reasoning")
}
ENGLISH, CHINESE = REASONING["en"], REASONING["zh"]
HOSTILE = [case["text"] for case in read_cases(__file__, "language", kind="unit")]
# Golden case r1_language_consistency: target words, all words, accuracy, consistency, total.
R1_LANGUAGE_CONSISTENCY = [(18, 24, 1, 0.75, 1.75), (20, 20, 0, 1.0, 1.0), (0, 5, 1, 0.0, 1.0)]
TWENTY_WORDS = (
    "the children share twelve apples among three friends and each of them gets four before "
    "they go home for lunch"
)


def english_and_chinese(num_english, num_chinese):
    return " ".join(TWENTY_WORDS.split()[:num_english]) + " " + CHINESE[:num_chinese]


def is_correct(*, correct, **_columns):
    return correct


@pytest.mark.parametrize("case", R1_LANGUAGE_CONSISTENCY)
def test_the_share_and_its_sum_with_accuracy_match_the_golden_case(case):
    target_words, total_words, accuracy, share, total = case
    text = english_and_chinese(target_words, total_words - target_words)
    scores = score(
        {"correct": (is_correct, 1.0), "language": (language_reward("en"), 1.0)},
        [f"<think>{text}</think>"],
        prompts=["p"],
        completion_ids=[[1]],
        columns={"correct": [accuracy]},
        scoring=Scoring(num_workers=0),  # this process has loaded the library
    )
    assert scores.parts["language"] == [share]
    assert scores.totals == [total]


def test_each_language_is_found_in_itself_and_in_no_other():
    for spoken, text in REASONING.items():
        shares = {code: language_share(text, code) for code in REASONING}
        assert {code: share for code, share in shares.items() if share} == {spoken: 1.0}


def test_a_change_of_language_within_the_script_is_seen_by_the_sentence():
    """Five sentences of ten English words, five of ten Spanish ones, in turn: half is English."""
    english = "we know that every child needs four apples for lunch. "
    spanish = "sabemos que cada niño necesita cuatro manzanas para la cena. "
    assert language_share((english + spanish) * 5, "en") == 0.5
    assert language_share((english * 3 + spanish) * 5, "es") == 0.25


def test_a_change_of_language_without_a_full_stop_is_seen_too():
    english = "we know that every child needs four apples for lunch " * 4
    spanish = "sabemos que cada niño necesita cuatro manzanas para la cena " * 4
    assert [language_share(english + spanish, code) for code in ("en", "es")] == [0.5, 0.5]


def test_short_sentences_are_told_apart_together():
    assert language_share("We count. There are four. So he has two. Then she gives one.", "en") == 1


def test_what_is_left_behind_the_last_window_belongs_to_it():
    assert language_share(ENGLISH + " So four.", "en") == 1.0


def test_a_character_is_a_word_where_words_are_not_spaced():
    """Three English words and nine characters."""
    text = "the final answer 每个孩子得到四个苹"
    assert [language_share(text, code) for code in ("zh", "en", "de")] == [0.75, 0.25, 0.0]


def test_four_letters_of_thai_are_a_word():
    """12 letters and signs are 3 words, and 2 are a short one."""
    assert language_share("ตะกร้าแอปเปิ apples", "th") == 0.75
    assert language_share("ไป apples", "th") == 0.5


def test_signs_of_a_letter_do_not_cut_words():
    """Four words of Hindi, full of vowel signs, and one of English."""
    assert language_share("हिन्दी गिनती पहले कुल apples", "hi") is None  # five words, three languages
    assert language_share("தமிழ் எண்கள் முதலில் மொத்தம் apples", "ta") == 0.8


def test_names_of_things_are_no_words():
    text = "三角形ABC中，x 等于 y，所以 GCD 是四"
    assert language_share(text, "zh") == 1.0
    assert language_share(text + " therefore", "zh") == 10 / 11
    assert language_share(text + " EVERYTHING", "zh") == 10 / 11
    assert language_share("ABC x y 12 + 3", "en") is None


def test_code_and_formulas_have_no_words():
    for case in read_cases(__file__, "language", kind="not prose"):
        assert language_share(f"{ENGLISH} {case['text']} {ENGLISH}", "en") == 1.0, case
        assert language_share(case["text"], "en") is None, case


def test_an_address_ends_where_its_characters_do():
    assert language_share(f"见 https://example.com/a?b=c,{CHINESE}", "zh") == 1.0
    assert language_share("https://example.com/how-to-count www.example.com", "zh") is None


@pytest.mark.parametrize("sign", ["$", "$$", "`", "```", r"\(", r"\[", r"\begin{align}", "$5 and "])
def test_what_is_opened_and_not_closed_hides_nothing(sign):
    """Twenty English words beside ten Chinese characters, and the "and" between prices."""
    share = language_share(f"{TWENTY_WORDS}\n{sign}{CHINESE[:10]}", "en")
    assert share == (21 / 31 if "and" in sign else 20 / 30)


def test_prices_are_no_formula():
    text = "The book costs $5 and the 苹果苹果苹果苹果 costs $6 more than $4 apples and pears do."
    assert language_share(text, "en") == 12 / 20
    assert language_share(f"{TWENTY_WORDS} costs $5苹果苹果$6.", "en") == 21 / 25


def test_only_what_stands_before_the_last_end_of_think_counts():
    assert language_share(f"<think>{ENGLISH}</think>{CHINESE}", "en") == 1.0
    assert language_share(f"{ENGLISH}</think>{CHINESE}", "zh") == 0.0
    assert language_share(f"<think>{CHINESE}", "zh") == 1.0
    assert language_share(f"<think>{ENGLISH}</think>{CHINESE}</think>", "en") < 0.6
    assert language_share(f"<think></think>{ENGLISH}", "en") is None


def test_too_few_words_for_their_script_cannot_be_told_apart():
    nine = "we have four apples and each child gets two"
    assert language_share(nine, "en") is None
    assert language_share(nine + " apples", "en") == 1.0
    assert language_share(nine, "ru") == 0.0  # the script is another: no doubt
    assert language_share("네 개", "ko") == 1.0  # no other language has this script
    for nothing in ("", "42 + 7", "<think>", "😀 … 12%"):
        assert language_share(nothing, "en") is None


def test_where_the_languages_that_occur_are_known_their_scripts_decide_in_few_words():
    assert language_share("ones 十 tens", "en", among=["en", "zh"]) == 2 / 3
    assert language_share("ones tens", "en", among=["zh"]) == 1.0
    assert language_share("ones tens", "en", among=["en", "fr"]) is None  # one script, few words
    assert language_reward("en", among=["zh"])(["ones 十"]) == [0.5]
    with pytest.raises(ConfigError, match="found 'xx'"):
        language_reward("en", among=["xx"])


def test_letters_of_another_width_and_marks_of_length_belong_to_their_script():
    for word in ("ﾘﾝｺﾞ", "スーパー", "人々"):
        assert language_share(f"{REASONING['ja']} {word}", "ja") == 1.0
    assert language_share("ａｎｓｗｅｒ 네 개", "ko") == 2 / 3


def test_accents_and_what_colours_an_emoji_are_no_words():
    assert language_share(unicodedata.normalize("NFD", "réponse 네 개"), "ko") == 2 / 3
    assert language_share("네 개 ❤\ufe0f \u0301", "ko") == 1.0


def test_kana_in_chinese_are_foreign():
    num_characters = sum(character not in "，。" for character in CHINESE)
    assert language_share(CHINESE + "の", "zh") == num_characters / (num_characters + 1)


def test_a_long_text_is_judged_by_its_two_ends():
    half = (ENGLISH + " ") * (MAX_CHARS // 2 // len(ENGLISH) + 1)
    assert language_share(half + CHINESE * 1000 + half, "en") == 1.0
    assert language_share(half + CHINESE * 3000, "en") < 0.5


def test_the_reward_takes_a_column_or_one_language_and_reads_messages():
    chats = [[{"role": "assistant", "content": REASONING[code]}] for code in ("en", "de")]
    assert language_consistency(chats, language=["en", "en"], prompts=["p"] * 2) == [1.0, 0.0]
    assert language_reward("de")(completions=chats) == [0.0, 1.0]


@pytest.mark.parametrize("unknown", ["english", "xx", "", None, ["en"], 1])
def test_an_unknown_language_is_refused_before_the_first_step(unknown):
    with pytest.raises(ConfigError, match="expected an ISO 639-1 code"):
        language_reward(unknown)
    with pytest.raises(ConfigError, match="Known: af, ar"):
        language_share(ENGLISH, unknown)
    rewards = {"language": (language_consistency, 1.0)}
    assert list(find_unscorable(rewards, {"language": ["en", unknown, "zh"]})) == [1]


@pytest.mark.parametrize(("written", "meant"), [("EN", "en"), ("zh-CN", "zh"), ("pt-br", "pt")])
def test_a_region_or_capitals_are_named_in_the_error(written, meant):
    with pytest.raises(ConfigError, match=f"Did you mean '{meant}'"):
        check_language(written)


def test_the_column_is_needed_unless_the_language_is_bound():
    with pytest.raises(ConfigError, match="needs 'language'"):
        check_rewards({"language": (language_consistency, 1.0)}, ["answer"])
    rewards = {"language": (language_reward("en"), 1.0)}
    check_rewards(rewards, ["answer"])
    assert find_unscorable(rewards, {"answer": ["1"]}) == {}
    misspelt = {"language": (partial(language_consistency, language="english"), 1.0)}
    with pytest.raises(ConfigError, match="english"):
        find_unscorable(misspelt, {"answer": ["1"]})


def test_every_language_can_be_told_apart_by_the_library():
    from py3langid import rank

    assert LANGUAGES.keys() <= {code for code, _ in rank("apples")}


def test_the_library_is_not_loaded_before_it_is_needed():
    program = (
        "import sys; from posttrain.rewards.language import language_share as f; "
        "assert f('네 개', 'ko') == 1 and f('네 개', 'en') == 0; "
        "print('py3langid' in sys.modules, 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["False", "False"], run.stderr


def test_a_long_text_of_anything_never_hangs_and_never_raises():
    """Long enough that quadratic work would take most of a minute."""
    for unit in HOSTILE:
        text = unit * (50_000 // len(unit))
        with deadline(15, unit):
            language_share(text, "en")
            language_share(f"<think>{text}</think>", "zh")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*HOSTILE, ENGLISH, CHINESE]) | st.text(max_size=20), max_size=12),
    st.sampled_from(["en", "zh", "ja", "ru", "hi", "th", "el"]),
)
def test_a_share_is_a_number_from_0_to_1_or_none(pieces, language):
    share = language_share("".join(pieces), language)
    assert share is None or 0.0 <= share <= 1.0
