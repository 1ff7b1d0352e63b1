"""A tiny model and tokenizer, built here: the tests need no network and no downloads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # also keeps TRL's telemetry off
# Threads wait for one another by spinning: on tiny matrices and a busy machine two are ten times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path

import peft
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from calibrate import corpora, extraction, shards
from calibrate.commands import compare
from calibrate.models import Checkpoint, hash_weights
from calibrate.vectors import EmotionVectors

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEPTH, WIDTH = 5, 32
CONCEPTS = ("desperate", "calm", "angry", "afraid", "sad", "happy", "guilty", "proud", "hopeful", "frustrated")


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    """Keeps cached reference readings of one test away from another; slow tests use the user's converted model."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("CALIBRATE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session", autouse=True)
def few_tasks():
    """Two tasks make a verdict in tests, which is quick; the plants have twelve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "MIN_TASKS", 2)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer trained on shipped stories and contexts, with a ChatML template.

    It halves the tokens of contexts, whose attention is most of what the tests compute.
    """
    core = Tokenizer(models.BPE())
    # Qwen2's, which is what the saved model's tokenizer has once it is loaded.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    texts = [story.text for story in corpora.load_stories()[:80]]
    texts += [part["content"] for twin in corpora.load_twins()[::10] for row in twin for part in row.messages]
    core.train_from_iterator(texts, trainer)
    # Yes and No, which answer the audit's questions, are one token in real tokenizers: here in place of the rarest.
    content = json.loads(core.to_str())
    learnt, merges = content["model"]["vocab"], content["model"]["merges"]
    for parts in (("Y", "es"), ("N", "o")):
        if "".join(parts) not in learnt:
            learnt["".join(parts)] = learnt.pop("".join(merges.pop()))
            merges.append(parts)
    core = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory) -> Path:
    """A random Qwen2 of five layers and width 32, saved with its tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=DEPTH,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder, tokenizer) -> Checkpoint:
    """The tiny model, freshly loaded, in evaluation mode."""
    model = Qwen2ForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    return Checkpoint(model, tokenizer, str(tiny_folder), str(tiny_folder), hash_weights(model))


@pytest.fixture(scope="session")
def tiny_vectors(tiny_folder, tokenizer, tmp_path_factory) -> Path:
    """Vectors of the tiny model from the shipped training stories, saved; its band is layer 2, set by hand."""
    model = Qwen2ForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    checkpoint = Checkpoint(model, tokenizer, str(tiny_folder), str(tiny_folder), hash_weights(model))
    layers = extraction.candidate_layers(DEPTH)
    stories = [story for story in corpora.load_stories() if story.split == "train"]
    stories = [story for story in stories if story.concept in CONCEPTS]
    dialogues = [row for row in corpora.load_neutral() if row.split == "train"][:40]
    items = {
        "stories": extraction.story_items(tokenizer, stories),
        "neutral": extraction.neutral_items(tokenizer, dialogues),
    }
    groups = shards.read(checkpoint, items, layers, tmp_path_factory.mktemp("states"))
    neutral = extraction.neutral_states(groups["neutral"])
    read = extraction.Read(
        stories, groups["stories"], neutral["token"], list(dict.fromkeys(s.concept for s in stories))
    )
    found = extraction.by_recipe("paper", read)
    vectors = extraction.make_vectors(checkpoint, read.concepts, found, neutral, layers, {"split": "train"})
    vectors.set_band([2], "set by the test")
    folder = tmp_path_factory.mktemp("vectors") / "train"
    vectors.save(folder)
    return folder


@pytest.fixture
def planted() -> EmotionVectors:
    """Vectors with two orthogonal directions, and neutral states of mean 0 and deviation 2 along every axis."""
    torch.manual_seed(0)
    vectors = EmotionVectors(
        concepts=["desperate", "calm"], layers=[1, 2], hidden_size=8, depth=DEPTH,
        samples={"token": 4000, "header": 4000, "reply": 4000, "text": 4000},
        model="planted", weight_hash="0", recipe={},
    )  # fmt: skip
    vectors.directions[0, :, 0] = 1
    vectors.directions[1, :, 1] = 1
    for pooling in ("token", "header", "reply", "text"):
        vectors.neutral(pooling).normal_(0, 2)
    return vectors


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Options that restrict the shipped corpora: 3 concepts on 5 topics, 9 dialogues, 4 tasks with their pairs."""
    folder = tmp_path_factory.mktemp("texts")
    rows = {"stories": [], "neutral": [], "twins": [], "pairs": []}
    for split, topics, dialogues, tasks in (("train", 2, 3, 0), ("selection", 1, 3, 4), ("audit", 2, 3, 3)):
        stories = [story for story in corpora.load_stories() if story.split == split]
        kept = list(dict.fromkeys(story.topic for story in stories))[:topics]
        rows["stories"] += [s for s in stories if s.topic in kept and s.concept in ("desperate", "calm", "proud")]
        rows["neutral"] += [row for row in corpora.load_neutral() if row.split == split][:dialogues]
        twins = [twin for twin in corpora.load_twins() if twin[0].split == split][:tasks]
        rows["twins"] += [context for twin in twins for context in twin]
        rows["pairs"] += [pair for pair in corpora.load_pairs() if pair.task in [failing.task for failing, _ in twins]]
    files = {name: write_jsonl(folder / f"{name}.jsonl", [row._asdict() for row in rows[name]]) for name in rows}
    shared = [word for name in ("neutral", "twins", "stories") for word in (f"--{name}", files[name])]
    return {"extract": shared, "audit": [*shared, "--pairs", files["pairs"], "--max-rows", 6]}


@pytest.fixture(scope="session")
def adapter(tiny_folder, tmp_path_factory):
    """A LoRA adapter of the tiny model that changes what it computes."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    tuned.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    return folder


def write_jsonl(path: Path, rows: list) -> Path:
    """Writes rows (dicts, or raw lines) to a JSONL file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
