"""Models of images and text: what is read of them is the text model that transformers has in them."""

import copy
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefalign_jax.cost.shapes import SHAPES
from prefalign_jax.models import families, hf_io, loading
from prefalign_jax.models.decoder_config import DecoderConfig
from prefalign_jax.types import UserError
from test_families_parity import CASES, SMALL, close, draw, golden_file, load_theirs, our_logits, their_logits

TEXT = {
    "gemma3": "gemma3_text",
    "mistral3": "ministral3",
    "qwen3_5": "qwen3_5_text",
}  # model_type -> that of its text model here
OTHERS = draw({"vision_tower.patches.weight": (4, 3), "multi_modal_projector.linear.weight": (3, 4), "visual.x": (2,)})
# How transformers 4 named the text model's tensors, its head and those of the images, and how 5 has them in memory.
NAMES = {"older": ("language_model.model.", "language_model.", ""), "newer": ("model.language_model.", "", "model.")}


def text_model(directory, case: str) -> tuple[dict, dict]:
    """The config.json and tensors of a text model, written into a directory."""
    with np.load(golden_file(case)) as stored:
        hf, shapes = json.loads(str(stored["config"])), json.loads(str(stored["shapes"]))
    tensors = draw({name: tuple(shape) for name, shape in shapes.items()})
    write(directory, hf, tensors)
    return hf, tensors


def write(directory, hf: dict, tensors: dict) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf))
    save_file(tensors, directory / hf_io.SINGLE)


def seeing(model_type: str, text: dict, **more) -> dict:
    return {"model_type": model_type, "text_config": text, "vision_config": {"hidden_size": 8}, **more}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("model_type", TEXT)
def test_the_text_model_is_read_and_what_is_left_out_is_told(model_type, names, tmp_path, monkeypatch):
    hf, tensors = text_model(tmp_path / "text", TEXT[model_type])
    body, head, images = NAMES[names]
    renamed = {body + name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
    renamed |= {head + name: x for name, x in tensors.items() if not name.startswith("model.")}
    ends = {name: value for name, value in hf.items() if name != "eos_token_id"}
    whole = seeing(model_type, ends, eos_token_id=[1, 106], tie_word_embeddings=True)
    write(tmp_path / "whole", whole, renamed | {images + name: x for name, x in OTHERS.items()})

    config = hf_io.load_config(tmp_path / "text")
    assert hf_io.load_config(tmp_path / "whole") == config  # whether its head is tied is what the files say
    notes = []
    monkeypatch.setattr(loading, "note", notes.append)
    _, params = loading.load_decoder(tmp_path / "whole")
    assert notes == [f"{tmp_path / 'whole'}: only the text model is read; 3 other tensors are left out"]
    jax.tree.map(np.testing.assert_array_equal, params, hf_io.load_params(tmp_path / "text", config))

    hf_io.save_params(params, config, tmp_path / "out", base=tmp_path / "whole")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["eos_token_id"]) == (TEXT[model_type], [1, 106])
    out = load_file(tmp_path / "out" / hf_io.SINGLE)
    assert out.keys() == tensors.keys()


def test_layers_that_predict_ahead_are_left_out_and_told_where_a_family_has_them(tmp_path, monkeypatch):
    ahead = draw({"mtp.fc.weight": (4, 3), "mtp.norm.weight": (4,)})
    hf, tensors = text_model(tmp_path / "text", "qwen3_5_text")
    write(tmp_path / "ahead", hf, tensors | ahead)
    notes = []
    monkeypatch.setattr(loading, "note", notes.append)
    _, params = loading.load_decoder(tmp_path / "ahead")
    assert notes == [f"{tmp_path / 'ahead'}: only the text model is read; 2 other tensors are left out"]
    jax.tree.map(
        np.testing.assert_array_equal,
        params,
        hf_io.load_params(tmp_path / "text", hf_io.load_config(tmp_path / "text")),
    )

    hf, tensors = text_model(tmp_path / "llama", "llama llama3")
    write(tmp_path / "strange", hf, tensors | ahead)
    with pytest.raises(UserError, match="tensor mtp.fc.weight has no place in a llama model"):
        loading.load_decoder(tmp_path / "strange")


def test_a_tied_head_that_is_stored_twice_stays_tied(tmp_path):
    hf, tensors = text_model(tmp_path / "text", "gemma3_text")
    table = tensors["model.embed_tokens.weight"]
    for number, (head, said, tied) in enumerate([(table, True, True), (table, False, False), (table + 1, True, False)]):
        directory = tmp_path / str(number)
        write(directory, seeing("gemma3", hf | {"tie_word_embeddings": said}), tensors | {"lm_head.weight": head})
        config = hf_io.load_config(directory)
        assert config.tie_embeddings is tied and ("head" in hf_io.load_params(directory, config)) is not tied


def test_a_head_that_differs_in_one_row_is_never_taken_for_tied(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_io, "SEEN", 4)
    hf, tensors = text_model(tmp_path / "text", "gemma3_text")
    table = tensors["model.embed_tokens.weight"]
    for row in range(0, len(table), 13):  # at most four of these are looked at with the config alone
        head = table.copy()
        head[row] += 1
        directory = tmp_path / str(row)
        write(directory, seeing("gemma3", hf), tensors | {"lm_head.weight": head})
        if (config := hf_io.load_config(directory)).tie_embeddings:
            with pytest.raises(UserError, match="tensors .* differ; set it to false"):
                hf_io.load_params(directory, config)
            directory = tmp_path / f"{row} untied"
            write(directory, seeing("gemma3", hf | {"tie_word_embeddings": False}), tensors | {"lm_head.weight": head})
            config = hf_io.load_config(directory)
        assert "head" in hf_io.load_params(directory, config)


def test_a_config_is_read_without_reading_its_tables(tmp_path, monkeypatch):
    hf, tensors = text_model(tmp_path / "text", "gemma3_text")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(tmp_path / "whole", seeing("gemma3", hf), tensors)
    read, plain = [], hf_io._Tensor.__getitem__
    monkeypatch.setattr(hf_io, "SEEN", 4)
    monkeypatch.setattr(hf_io._Tensor, "__getitem__", lambda self, index: read.append(x := plain(self, index)) or x)
    assert hf_io.load_config(tmp_path / "whole").tie_embeddings
    assert 0 < sum(map(len, read)) <= 2 * 4


def test_gemma_3_says_little_of_its_text_model():
    few = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024)
    scaling = {"factor": 8.0, "rope_type": "linear"}
    hf = families.text_config(seeing("gemma3", few | {"rope_scaling": scaling}))
    named = SHAPES["gemma-3-4b"] | {"rope_scaling": scaling}
    assert DecoderConfig(**families.from_hf(hf)) == DecoderConfig(**families.from_hf(named))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": None}, "text_config=None is not supported; supported: an object"),
        ({"text_config": {"model_type": "mistral4"}}, "model_type='mistral4' is not supported"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "supported: a language model"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
    ],
    ids=["text_config", "model_type", "architectures", "quantization_config"],
)
def test_what_is_not_read_is_refused_by_name(change, words):
    with pytest.raises(UserError, match=words):
        families.from_hf(families.text_config(seeing("gemma3", SMALL) | change))


@pytest.mark.parity
@pytest.mark.everything
@pytest.mark.parametrize("model_type", TEXT)
def test_transformers_gives_a_text_the_same_logits(model_type, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    case = TEXT[model_type]
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    kinds = {"gemma3": "siglip_vision_model", "qwen3_5": "qwen3_5_vision"}
    vision |= dict(image_size=8, patch_size=4, model_type=kinds.get(model_type, "pixtral"))
    text = {**copy.deepcopy({**SMALL, **CASES[case]}), "model_type": case}
    config = transformers.AutoConfig.for_model(
        model_type, text_config=text, vision_config=vision, image_token_index=60, mm_tokens_per_image=4
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "in")
    shapes = {name: x.shape for name, x in load_file(tmp_path / "in" / hf_io.SINGLE).items()}
    save_file(draw(shapes), tmp_path / "in" / hf_io.SINGLE, metadata={"format": "pt"})
    model = type(model).from_pretrained(tmp_path / "in", dtype=torch.float32, attn_implementation="eager").eval()
    logits = their_logits(model)

    config = hf_io.load_config(tmp_path / "in")
    params = hf_io.load_params(tmp_path / "in", config)
    assert config.family == case and config.tie_embeddings is (model_type != "qwen3_5")
    close(our_logits(config, params), logits)
    hf_io.save_params(params, config, tmp_path / "out", base=tmp_path / "in")
    close(their_logits(load_theirs(tmp_path / "out")), logits, 1e-6)
