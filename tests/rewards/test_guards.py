import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from alignpro.config import ModelConfig, RewardConfig
from alignpro.data import Message, Prompt
from alignpro.errors import ConfigError, ModelError, RewardError
from alignpro.rewards import build_reward
from alignpro.rewards.embedding import EmbeddingSimilarity
from alignpro.rewards.guards import LanguageChange, copy_rate, length_ratio
from alignpro.rewards.kept import code_kept, names_kept, numbers_kept

BPO = Path(__file__).parents[2] / "../shared/data/bpo_test.json"


@pytest.fixture(scope="module")
def language_change():
    return LanguageChange()


@pytest.fixture
def guarded(tmp_path):
    """Return a factory of reward stacks whose reward is zero except for their guards."""
    file = tmp_path / "zero.py"
    file.write_text("def zero(prompts, responses): return [0.0] * len(prompts)\n")

    def make(*guards):
        return build_reward(RewardConfig(components=[{"kind": "function", "function": f"{file}:zero"}], guards=guards))

    return make


def test_length_ratio():
    originals = ["four", "four", "  four ", "", "four", "é" * 4]
    rewrites = ["eight888", "", "ab\n", "abc", "   ", "e" * 4]
    assert length_ratio(originals, rewrites) == [2.0, 0.0, 0.5, 3.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("original", "rewrite", "rate"),
    [
        ("sort the letters of banana", "sort the letters of banana", 1.0),
        ("sort the letters of banana", "Sort the letters, of BANANA!", 1.0),  # case and punctuation are ignored
        ("sort the letters of banana", "letters of banana", 1.0),  # an excerpt
        ("sort the letters of banana", "banana of letters the sort", 0.0),  # the same words in another order
        ("sort the letters of banana", "sort the letters of apple", 2 / 3),
        ("sort the letters of banana", "please reverse stone now", 0.0),
        ("a b c a b c", "a b c a b c a b c", 1.0),
        ("banana", "please sort banana", 1 / 3),  # the original has one word, so single words are compared
        ("", "please sort banana", 0.0),
        ("sort banana", "", 0.0),
        ("", "", 0.0),
        ("...", "?!", 0.0),
        ("请把这些字母排序", "把这些字母", 1.0),  # no spaces: characters are words
        ("请把这些字母排序", "完全不同的句子", 0.0),
        ("cafe\u0301 au lait", "caf\u00e9 au lait", 1.0),  # the same text in two Unicode forms
        ("हिन्दी में लिखो यह", "हिन्दी में लिखो", 1.0),  # combining marks belong to their word
    ],
)
def test_copy_rate(original, rewrite, rate):
    assert copy_rate([original], [rewrite]) == [pytest.approx(rate)]


@pytest.mark.parametrize(
    ("original", "rewrite", "changed"),
    [
        (
            "Write a poem about the sea and the stars above it.",
            "Schreibe ein Gedicht über das Meer und die Sterne.",
            1.0,
        ),
        (
            "Schreibe ein Gedicht über das Meer und die Sterne.",
            "Write a poem about the sea and the stars above it.",
            1.0,
        ),
        ("Write a poem about the sea and the stars above it.", "请写一首关于大海和星星的诗,要有韵律,也要有感情。", 1.0),
        (
            "Write a poem about the sea and the stars above it.",
            "Please compose a short poem about the sea and stars.",
            0.0,
        ),
        ("Write a poem about the sea and the stars above it.", "", 0.0),
        ("", "Schreibe ein Gedicht über das Meer und die Sterne.", 0.0),
        ("Write a poem about the sea and the stars above it.", "Meer", 0.0),  # too short to tell
        ("Write a poem about the sea and the stars above it.", "def f(x): return x + 1  # 12345", 0.0),
    ],
)
def test_language_change(language_change, original, rewrite, changed):
    assert language_change([original], [rewrite]) == [changed]


@pytest.mark.parametrize(
    ("original", "rewrite", "share"),
    [
        ("add 12 and 30", "What is 12 plus 30?", 1.0),
        ("add 12 and 30", "What is 12 plus thirty?", 0.5),
        ("add 12 and 12", "Double 12.", 1.0),
        ("pay 1,000.50 now", "Pay 1000.50 today.", 1.0),
        ("pay 1,000,000 now", "Pay 1000000.", 1.0),
        ("take 1,5 kg", "take 15 kg", 0.0),
        ("take 1,5 kg", "take 1.5 kg", 1.0),
        ("sum 1,2,3", "add 1, 2 and 3", 1.0),
        ("at -5 degrees", "at 5 degrees", 0.0),
        ("at \u22125 degrees", "below -5 degrees", 1.0),
        ("rows 3-5", "rows 3 to 5", 1.0),
        ("from 2024-01-31", "since 31.01.2024", 0.0),
        ("from 2024 on", "since 2024.", 1.0),
        ("version 1.5", "version 1.50", 0.0),
        ("use gpt4", "use gpt-4", 1.0),
        ("\u0663 apples", "3 apples", 1.0),
        ("no numbers", "none", 1.0),
        ("", "", 1.0),
    ],
)
def test_numbers_kept(original, rewrite, share):
    assert numbers_kept([original], [rewrite]) == [share]


@pytest.mark.parametrize(
    ("original", "rewrite", "share"),
    [
        ("write to Anna and O'Brien", "Write a letter to anna and O\u2019Brien.", 1.0),
        ("write to Anna and Bob", "Write a letter to Anna.", 0.5),
        ("Write a poem. Make it short", "Compose short verses.", 1.0),  # capitals that begin sentences
        ("why does NASA use the iPhone", "explain it", 0.0),
        ("what is Anna's age", "How old is Anna?", 1.0),
        ("what can I do, and what could I've done", "what to do", 1.0),
        ("HELP ME WRITE A POEM", "Write verses.", 1.0),  # capitals everywhere
        ("he said:\n- Stop it", "end", 1.0),
        ("给我写一首诗", "诗", 1.0),
        ("", "Anna", 1.0),
        ("is GPT4 better than an iPhone15", "Compare gpt4 with an iphone15.", 1.0),
        ("is GPT4 better than GPT3", "Is GPT4 good?", 0.5),
        ("what did Zoe\u0308 say", "Quote Zo\u00eb.", 1.0),
        ("meet at 4PM in my 2ndFloor", "We meet.", 1.0),  # these begin with a digit
    ],
)
def test_names_kept(original, rewrite, share):
    assert names_kept([original], [rewrite]) == [share]


ODD_TEXTS = (
    "Please use GPT4 for this",
    "play MP3 and PS5 and AK47s on my iPhone15 Pro, or the H2O of CO2's",
    "what did Zoe\u0308 say to I\u0307pek and X\u0304u of Zu\u0308rich2024",
    "buy Lego\u2122 or Coca-Cola\u00ae No\u2116 5 at \u00bdPrice, x\u00b2Y, \u2167Henry",
    "ask 1Password about my_Var, the __Init and A1_B2",
    "the Apple\ufe0f emoji \u2764\ufe0f of Nai\u0308ve-O\u2019Neill2",
    "why is \u01c5emal \ufb01Fine in \u5317\u4eacGPT4\u5728",
    "pay 1,5 or -3 or \u22124 or 1.000,5 at 5\u00d75, \u0663Items",
    "`a``b` ```c``` a_b__c _d_ https://a.b/c_(d), <https://e.f>",
)


def test_what_is_copied_has_kept_everything():
    texts = list(ODD_TEXTS)
    if BPO.exists():
        texts += [row["prompt"] for row in json.loads(BPO.read_text(encoding="utf-8"))]
    draw = random.Random(0)
    pieces = [*"aZ1 -_.`\n", "Ab", "GPT", "2,5", " ", "'s", "e\u0301", "\u0308", "\u5317", "\u2122", "\ufe0f"]
    texts += ["".join(draw.choices(pieces, k=12)) for _ in range(3000)]
    for kept in (names_kept, numbers_kept, code_kept):
        assert [text for text, share in zip(texts, kept(texts, texts), strict=True) if share < 1] == []


@pytest.mark.parametrize(
    ("original", "rewrite", "share"),
    [
        ("fix this\n```python\nx = 1\n```", "Correct the code:\n```\nx  =  1\n```", 1.0),
        ("fix this\n```python\nx = 1\n```", "Correct the code.", 0.0),
        ("what does `ls -l` do", "Explain ls -l.", 1.0),
        ("compare `a` with `b c`", "Compare a with something.", 0.5),
        ("read https://a.b/c?d=1, please", "Summarise https://a.b/c?d=1.", 1.0),
        ("read https://a.b/c?d=1", "Summarise the page.", 0.0),
        ("why is max_tokens ignored", "Why is the limit ignored?", 0.0),
        ("why is `max_tokens` ignored", "Why is max_tokens ignored?", 1.0),
        ("no code", "none", 1.0),
        ("``` ```", "", 1.0),
    ],
)
def test_code_kept(original, rewrite, share):
    assert code_kept([original], [rewrite]) == [share]


def test_what_is_kept_is_penalised_as_configured(guarded):
    reward = guarded(*({"kind": f"{kind}_kept", "penalty": 1.0, "low": 1.0} for kind in ("numbers", "names", "code")))
    scored = reward([Prompt.from_text("give Bob 5 `x` and 6")], ["y"], ["Give 5."])
    assert scored.values == [-2.5]
    assert scored.components["guard/numbers_kept"] == [0.5]


def test_the_language_of_a_prompt_is_detected_once_for_all_its_rewrites(language_change):
    prompt, rewrites = "Which of the two cats is older?", [f"Which of the {n} cats is the older one?" for n in range(3)]
    before = language_change._language.cache_info().misses
    assert language_change([prompt] * 4, [*rewrites, prompt]) == [0.0] * 4
    assert language_change._language.cache_info().misses == before + 4


def test_half_a_surrogate_pair_is_accepted(language_change):
    garbled = "a text of some length with half a pair \ud800"
    assert language_change([garbled], [garbled]) == [0.0]
    assert copy_rate([garbled], [garbled]) == [1.0]
    assert (
        names_kept([garbled], [garbled])
        == numbers_kept([garbled], [garbled])
        == code_kept([garbled], [garbled])
        == [1.0]
    )


def test_guards_without_a_penalty_are_metrics(guarded):
    prompts = [Prompt((Message("system", "a long system message"), Message("user", "four")))] * 2
    scored = guarded({"kind": "length_ratio"}, {"kind": "copy_rate"})(prompts, ["y", "y"], ["eight888", "four"])
    assert scored.values == [0.0, 0.0]
    assert scored.components == {
        "zero": [0.0, 0.0],
        "guard/length_ratio": [2.0, 1.0],  # relative to the user's turn, without its context
        "guard/copy_rate": [0.0, 1.0],
    }


def test_penalty_grows_with_the_distance_from_the_range(guarded):
    prompts = [Prompt.from_text("four")] * 4
    reward = guarded({"kind": "length_ratio", "penalty": 0.5, "low": 0.5, "high": 2.0}, {"kind": "copy_rate"})
    scored = reward(prompts, ["y"] * 4, ["", "four", "four" * 2, "four" * 4])
    assert scored.components["guard/length_ratio/penalty"] == [0.25, 0.0, 0.0, 1.0]
    assert scored.values == [-0.25, 0.0, 0.0, -1.0]


def test_one_sided_range(guarded):
    prompts = [Prompt.from_text("one two three")] * 2
    reward = guarded({"kind": "copy_rate", "penalty": 2.0, "low": 1.0})
    assert reward(prompts, ["y"] * 2, ["one two three", "else"]).values == [0.0, -2.0]


def test_guards_are_skipped_without_rewrites(guarded):
    reward = guarded({"kind": "length_ratio", "penalty": 1.0, "high": 0.0})
    scored = reward([Prompt.from_text("four")], ["y"], None)
    assert scored.values == [0.0]
    assert scored.components == {"zero": [0.0]}


def test_one_guard_of_a_kind(guarded):
    with pytest.raises(ConfigError, match=r"reward.guards: 'copy_rate' occurs more than once"):
        guarded({"kind": "copy_rate"}, {"kind": "copy_rate"})


def encoder(path: Path) -> ModelConfig:
    return ModelConfig(path=str(path), device="cpu", attention="eager")


def test_embedding_similarity(encoder_path):
    similarity = EmbeddingSimilarity(encoder(encoder_path))
    originals = ["sort banana", "sort banana", "", "sort banana", "", "x" * 500]
    rewrites = ["sort banana ", "wholly different text", "", "", "sort banana", "x" * 400]
    same, other, *defined = similarity(originals, rewrites)
    assert same == pytest.approx(1.0, abs=1e-6)
    assert -1.0 <= other < 0.9999
    assert defined[:3] == [1.0, 0.0, 0.0]
    assert defined[3] == pytest.approx(1.0, abs=1e-6)  # both are truncated to the encoder's maximum length
    assert similarity([], []) == []


def test_an_embedding_does_not_depend_on_its_batch(encoder_path):
    similarity = EmbeddingSimilarity(encoder(encoder_path))
    texts = [("word " * n).strip() or "w" for n in range(1, 45)]  # more than one batch, with all lengths
    together = similarity(texts, texts[::-1])
    alone = [similarity([a], [b])[0] for a, b in zip(texts, texts[::-1], strict=True)]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)


def test_embedding_guard_in_the_stack(guarded, encoder_path):
    guard = {"kind": "embedding_similarity", "model": encoder(encoder_path).model_dump(), "penalty": 1.0, "low": 1.5}
    scored = guarded(guard)([Prompt.from_text("sort banana")], ["y"], ["sort banana"])
    assert scored.components["guard/embedding_similarity"] == [pytest.approx(1.0, abs=1e-6)]
    assert scored.values == [pytest.approx(-0.5, abs=1e-6)]


def test_missing_encoder_is_named(guarded, tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path / "missing")):
        guarded({"kind": "embedding_similarity", "model": {"path": str(tmp_path / "missing")}})


def test_failing_guard_names_itself_and_the_prompt(guarded, encoder_path, tmp_path):
    model = AutoModel.from_pretrained(encoder_path)
    torch.nn.init.constant_(model.get_input_embeddings().weight, float("nan"))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder_path).save_pretrained(tmp_path)
    reward = guarded({"kind": "embedding_similarity", "model": encoder(tmp_path).model_dump()})
    prompt = Prompt.from_text("sort banana", source="data.jsonl:7")
    with pytest.raises(RewardError, match=r"guard/embedding_similarity returned nan") as caught:
        reward([prompt], ["y"], ["reverse stone"])
    assert "data.jsonl:7" in str(caught.value)


@pytest.mark.skipif(not BPO.exists(), reason="the real prompts are not present")
def test_guards_on_real_rewrites(language_change):
    rows = json.loads(BPO.read_text(encoding="utf-8"))
    originals, rewrites = [row["prompt"] for row in rows], [row["optimized_prompt"] for row in rows]
    assert all(0.0 <= rate <= 1.0 for rate in copy_rate(originals, rewrites))
    assert copy_rate(originals, originals) == [1.0] * len(rows)
    assert all(ratio >= 0 for ratio in length_ratio(originals, rewrites))
    assert sum(language_change(originals, rewrites)) <= 0.02 * len(rows)  # almost all of the pairs are in English
