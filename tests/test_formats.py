import pytest
import torch
from conftest import write_jsonl
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from test_cli import calibrate, error

from calibrate import corpora
from calibrate.vectors import POOLINGS, EmotionVectors, load_vectors


@pytest.fixture
def vectors(planted, tmp_path):
    """The planted vectors on disk: two concepts on axes 0 and 1, layers 1 and 2 of 5, width 8."""
    planted.set_band(
        [2], "set by the test", {"contrast": [0.1, 0.2], "random_95": [1, 2], "held_out_accuracy": [3, 4]}
    )
    planted.save(tmp_path / "vectors")
    return tmp_path / "vectors"


def test_gguf_control_vectors(vectors, planted, tmp_path):
    """llama.cpp adds `direction.N` to the output of block N: our layer N. One unit of scale is the residual norm."""
    calibrate(
        "export", vectors, "--format", "gguf", "--concepts", "calm", "--hint", "qwen2", "--out", tmp_path / "out"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["calm.gguf"]
    reader = GGUFReader(tmp_path / "out" / "calm.gguf")
    fields = {name: reader.fields[name].contents() for name in ("general.architecture", "controlvector.model_hint")}
    assert fields == {"general.architecture": "controlvector", "controlvector.model_hint": "qwen2"}
    assert reader.fields["controlvector.layer_count"].contents() == 2
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert set(tensors) == {"direction.1", "direction.2"}
    for layer in (1, 2):
        row = planted.directions[planted.index("calm"), layer - 1]
        norm = planted.neutral("token")[:, layer - 1].norm(dim=-1).median()
        torch.testing.assert_close(tensors[f"direction.{layer}"], row * norm)


def test_persona_tensors_there_and_back(vectors, planted, tiny_folder, tmp_path):
    calibrate("export", vectors, "--format", "persona", "--out", tmp_path / "persona.safetensors")
    tensors = load_file(tmp_path / "persona.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"desperate": (6, 8), "calm": (6, 8)}
    assert tensors["calm"][[0, 1, 4, 5]].abs().max() == 0  # the embedding, and layers 0, 3, 4
    assert torch.equal(tensors["calm"][3], planted.directions[1, 1])  # row i + 1 is layer i
    wide = {name: torch.zeros(6, 32) for name in ("calm", "sad")}
    for axis, name in enumerate(wide):
        wide[name][2:4, axis] = 5.0
    save_file(wide, tmp_path / "wide.safetensors")
    command = ["extract", tiny_folder, "--directions", tmp_path / "wide.safetensors", "--out", tmp_path / "adopted"]
    calibrate(*command)
    adopted = load_vectors(str(tmp_path / "adopted"))
    assert (sorted(adopted.concepts), adopted.layers) == (["calm", "sad"], [1, 2])
    assert torch.equal(adopted.directions[adopted.index("sad"), 0], torch.eye(32)[1])
    assert (adopted.scale("header")[1] > 0).all()
    assert "(differing: layers)" in error(*command, "--layers", 2)


def test_sae_rows_as_directions(tiny_folder, tmp_path, capsys):
    decoder = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    save_file({"W_dec": decoder, "W_enc": decoder.T.contiguous()}, tmp_path / "sae.safetensors")
    command = ["extract", tiny_folder, "--directions", tmp_path / "sae.safetensors", "--out", tmp_path / "out"]
    calibrate(*command, "--sae-rows", "panic=3", "on edge=7", "--layers", 2)
    adopted = load_vectors(str(tmp_path / "out"))
    assert (adopted.concepts, adopted.layers) == (["panic", "on edge"], [2])
    torch.testing.assert_close(adopted.directions[1, 0], decoder[7] / decoder[7].norm())
    capsys.readouterr()
    calibrate(*command, "--sae-rows", "panic=3", "on edge=7", "--layers", 2)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--directions {tmp}/none.safetensors", "none.safetensors: no such file"),
        ("--directions {tmp}/pickle.pt", r"pickle.pt: not a safetensors file \(.*pickled `.pt` files are not read"),
        ("--directions {tmp}/narrow.safetensors", r"'calm' has the shape \[6, 8\]; the model needs .* = \[6, 32\]"),
        ("--directions {tmp}/zero.safetensors", "at no layer do all 1 tensors hold a direction"),
        ("--directions {tmp}/good.safetensors --layers 4", r"holds no directions at layers \[4\]; it has \[0\]"),
        ("--directions {tmp}/sae.safetensors --sae-rows a=1", "`--sae-rows` needs `--layers` with the one layer"),
        ("--directions {tmp}/sae.safetensors --sae-rows a --layers 2", "'a' is not NAME=ROW"),
        (
            "--directions {tmp}/sae.safetensors --sae-rows a=4 --layers 2",
            "row 4 of 'a' is out of range; .* rows 0 to 3",
        ),
        ("--directions {tmp}/sae.safetensors --sae-rows a=1 --layers 9", "layer 9 is out of range"),
        (
            "--directions {tmp}/good.safetensors --sae-rows a=1 --layers 2",
            "no tensor 'W_dec'; it has calm; name it with",
        ),
        (
            "--directions {tmp}/good.safetensors --sae-rows a=1 --layers 2 --sae-tensor narrow",
            "no tensor 'narrow'",
        ),
        (
            "--directions {tmp}/narrow.safetensors --sae-rows a=1 --layers 2 --sae-tensor calm",
            r"must be \[features, 32\]",
        ),
        ("--directions {tmp}/empty.safetensors", r"empty.safetensors: the file holds no tensors; give one \[layers"),
        (
            "--directions {tmp}/dead.safetensors --sae-rows a=1 b=2 --layers 2",
            "row 2 of 'W_dec' is zero and has no direction; leave out 'b'",
        ),
        (
            "--directions {tmp}/good.safetensors --recipes logistic --splits audit --target calm --seed 7",
            "makes nothing of `--splits`, `--recipes`, `--target`, `--seed`; leave it out",
        ),
        ("--directions {tmp}/good.safetensors --twins {tmp}/x.jsonl", "makes nothing of `--twins`; leave it out"),
        ("--directions {tmp}/good.safetensors --sae-tensor zzz", "makes nothing of `--sae-tensor`; leave it out"),
        (
            "--directions {tmp}/sae.safetensors --sae-rows a=1 a=2 --layers 2",
            r"names a concept twice \(a, a\); give one",
        ),
        ("--directions {tmp}/good.safetensors --neutral {tmp}/quiet.jsonl", "1 neutral dialogues .* need at least 2"),
    ],
)
def test_files_that_do_not_fit_are_refused(options, message, tiny_folder, tmp_path):
    good = torch.zeros(6, 32)
    good[1] = 1
    for name, tensors in {
        "narrow": {"calm": torch.ones(6, 8)}, "zero": {"calm": torch.zeros(6, 32)}, "good": {"calm": good},
        "sae": {"W_dec": torch.ones(4, 32)}, "empty": {},
        "dead": {"W_dec": torch.tensor([1.0, 1, 0, 1])[:, None].repeat(1, 32)},
    }.items():  # fmt: skip
        save_file(tensors, tmp_path / f"{name}.safetensors")
    torch.save({"calm": good}, tmp_path / "pickle.pt")
    dialogue = corpora.load_neutral()[0]._asdict()
    quiet = [dialogue | {"split": split} for split in ("train", "audit")]
    write_jsonl(tmp_path / "quiet.jsonl", quiet)
    line = error("extract", tiny_folder, *options.format(tmp=tmp_path).split(), "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)
    assert not (tmp_path / "out").exists()


def test_a_slim_half_folder_reads_the_same(vectors, planted, tmp_path):
    calibrate("export", vectors, "--format", "folder", "--layers", 2, "--half", "--out", tmp_path / "slim")
    slim = load_vectors(str(tmp_path / "slim"))
    assert (slim.layers, slim.band, slim.band_search["contrast"]) == ([2], [2], [0.2])
    assert load_file(tmp_path / "slim" / "model.safetensors")["directions"].dtype == torch.float16
    assert slim.directions.dtype == torch.float32
    states = 3 * torch.randn(4, 2, 8)
    torch.testing.assert_close(
        slim.readings(states[:, 1:], "text"), planted.readings(states, "text")[..., 1:], atol=5e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--format folder --layers 1", r"the band is \[2\]; `--layers` \[1\] leaves some of it out"),
        ("--format folder --layers 4", r"layers \[4\] are out of range"),
        ("--format gguf --half", "`--layers` and `--half` go with `--format folder` only"),
        ("--format persona --concepts calm", "`--concepts` goes with `--format gguf` only"),
        ("--format gguf --concepts calm angry", "no concept 'angry'"),
    ],
)
def test_exports_that_cannot_be_are_refused(options, message, vectors, tmp_path):
    line = error("export", vectors, *options.split(), "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)
    assert not (tmp_path / "out").exists()
    assert "exists; choose another" in error("export", vectors, "--format", "persona", "--out", vectors)


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    """llama.cpp has no layer 0; float16 ends at 65,504."""
    lowest = EmotionVectors(["calm"], [0], 8, 5, dict.fromkeys(POOLINGS, 2), "planted", "0", {})
    lowest.save(tmp_path / "lowest")
    line = error("export", tmp_path / "lowest", "--format", "gguf", "--out", tmp_path / "out")
    assert "no place for layer 0, the only one that these vectors hold; extract others with `--layers`" in line
    for size, refused in ((65_504.0, False), (70_000.0, True)):
        lowest.neutral("token")[1, 0, 3] = size
        lowest.save(tmp_path / "huge")
        command = ["export", tmp_path / "huge", "--format", "folder", "--half", "--out", tmp_path / f"half {refused}"]
        if refused:
            message = "error: neutral_token holds values beyond float16 (massive activations); export without `--half`"
            assert error(*command) == message
        else:
            calibrate(*command)
        assert (tmp_path / f"half {refused}").exists() is not refused
