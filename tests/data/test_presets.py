"""The presets' conversions, tested on one row of each data set; nothing is downloaded."""

import datasets
import pytest

from alignpro.config import DataConfig
from alignpro.data import Message, available_presets, load_prompts
from alignpro.data.columns import check_columns
from alignpro.data.presets import presets
from alignpro.errors import DataError

HELPSTEER_RATINGS = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}

ROWS = {
    "ultrafeedback": {
        "prompt": "Name a colour.",
        "prompt_id": "f0e3",
        "chosen": [{"content": "Name a colour.", "role": "user"}, {"content": "Blue.", "role": "assistant"}],
        "rejected": [{"content": "Name a colour.", "role": "user"}, {"content": "Dog.", "role": "assistant"}],
        "messages": [{"content": "Name a colour.", "role": "user"}, {"content": "Blue.", "role": "assistant"}],
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    },
    "helpsteer": {"prompt": "Name a colour.", "response": "Blue.", **HELPSTEER_RATINGS},
    "orca": {"system": "Be brief.", "question": "Name a colour.", "chosen": "Blue.", "rejected": "Dog."},
    "hh-rlhf": {
        "chosen": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Name a colour.\n\nAssistant: Blue.",
        "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Name a colour.\n\nAssistant: Dog.",
    },
    "bpo": {
        "prompt": "Name a colour.",
        "optimized_prompt": "Name one colour of the rainbow.",
        "good_res": "Blue.",
        "bad_res": "Dog.",
    },
}


def test_every_preset_has_a_row_here():
    assert ROWS.keys() == available_presets().keys()


@pytest.mark.parametrize("name", ROWS)
def test_conversion(name):
    preset = presets()[name]
    check_columns(preset.columns, ROWS[name], name)
    prompt = preset.convert(ROWS[name], f"{name}:1")
    assert prompt.text == "Name a colour."
    assert prompt.source == f"{name}:1"
    if name == "helpsteer":
        assert (prompt.response, prompt.metadata) == ("Blue.", HELPSTEER_RATINGS)
    else:
        assert (prompt.chosen, prompt.rejected) == ("Blue.", "Dog.")


def test_fields_that_only_some_presets_have():
    converted = {name: preset.convert(ROWS[name], "") for name, preset in presets().items()}
    assert converted["ultrafeedback"].metadata == {"score_chosen": 8.5, "score_rejected": 2.0}
    assert converted["orca"].messages[0] == Message("system", "Be brief.")
    assert presets()["orca"].convert(ROWS["orca"] | {"system": ""}, "").context == ()
    assert converted["hh-rlhf"].context == (Message("user", "Hi."), Message("assistant", "Hello."))
    assert converted["bpo"].rewrite == "Name one colour of the rainbow."


def serve(monkeypatch, rows):
    """Make the hub serve these rows as a data set of the `datasets` library."""
    asked = []

    def load_dataset(hub_id, split):
        asked.append((hub_id, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", ROWS)
def test_rows_from_the_datasets_library_are_converted(monkeypatch, name):
    asked = serve(monkeypatch, [ROWS[name]] * 2)
    preset = presets()[name]
    data = load_prompts(DataConfig(source=name))
    assert asked == [(preset.hub_id, preset.split)]
    assert [p.text for p in data.prompts] == ["Name a colour."]
    assert data.prompts[0].source == f"{preset.hub_id}/{preset.split}:row 1"
    assert data.report.duplicates == 1


def test_split_and_columns_override_the_preset(monkeypatch):
    asked = serve(monkeypatch, [ROWS["bpo"]])
    config = DataConfig(source="bpo", split="valid", columns={"prompt": "optimized_prompt"})
    (prompt,) = load_prompts(config).prompts
    assert asked == [("THUDM/BPO", "valid")]
    assert (prompt.text, prompt.chosen) == ("Name one colour of the rainbow.", None)


def test_known_bad_rows_do_not_count_against_the_limit(monkeypatch):
    serve(monkeypatch, [ROWS["hh-rlhf"]] + [{"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}] * 200)
    assert len(load_prompts(DataConfig(source="hh-rlhf")).report.bad) == 200


def test_a_preset_without_a_required_field_is_an_error(monkeypatch):
    serve(monkeypatch, [ROWS["helpsteer"]])
    with pytest.raises(DataError, match=r"nvidia/HelpSteer/train: no column for chosen, rejected"):
        load_prompts(DataConfig(source="helpsteer"), require=("chosen", "rejected"))


def test_an_unreachable_hub_is_an_error(monkeypatch):
    def load_dataset(hub_id, split):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"cannot load split 'train_prefs' of HuggingFaceH4.*no route to host"):
        load_prompts(DataConfig(source="ultrafeedback"))
