"""What the tests share: the path, a small real corpus, the smallest settings with every technique on."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy's and torch's threads, which only wait here

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "records")]
torch.set_num_threads(1)

import train_gpt as tg  # noqa: E402


def write_shard(path: Path, tokens) -> None:
    """A token shard in the published format."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> dict[str, str]:
    """Python's own documentation as shards with a 512-piece tokenizer; the settings that point to it."""
    from pydoc_data.topics import topics

    import sentencepiece

    folder = tmp_path_factory.mktemp("corpus")
    documents = [text.strip() for _, text in sorted(topics.items()) if text.strip()]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([line for text in documents for line in text.splitlines() if line.strip()]),
        model_writer=buffer, vocab_size=512, model_type="bpe", byte_fallback=True, split_digits=True,
        character_coverage=0.999, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False,
        hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    ids = [[1, *processor.encode(text)] for text in documents]
    write_shard(folder / "fineweb_val_000000.bin", sum(ids[::10], [])[:12_001])
    train = sum((doc for i, doc in enumerate(ids) if i % 10), [])
    half = len(train) // 2
    write_shard(folder / "fineweb_train_000000.bin", train[:half])
    write_shard(folder / "fineweb_train_000001.bin", train[half:])
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer.model"), "VOCAB_SIZE": "512"}


@pytest.fixture(scope="session")
def tiny(corpus) -> dict[str, str]:
    """The smoke preset with every technique on, shrunk until a whole run takes seconds, as an environment."""
    return corpus | {
        "PRESET": "smoke", "DTYPE": "fp32", "DEVICE": "cpu", "NUM_LAYERS": "3", "MODEL_DIM": "64",
        "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "MLP_MULT": "2", "ROPE_DIMS": "8", "XSA_LAST_N": "2",
        "BIGRAM_VOCAB_SIZE": "256", "BIGRAM_DIM": "32", "VE_DIM": "32", "VE_LAYERS": "1,2",
        "TRAIN_BATCH_TOKENS": "1024", "TRAIN_SEQ_LEN": "64", "ITERATIONS": "24", "WARMDOWN_ITERS": "16",
        "WARMUP_STEPS": "2", "EVAL_SEQ_LEN": "128", "EVAL_STRIDE": "64", "GPTQ_CALIB_SEQUENCES": "16",
        "TTT_CHUNK_TOKENS": "2048", "TTT_BATCH_SEQS": "4", "TTT_EPOCHS": "1", "TRAIN_LOG_EVERY": "10",
        "LATE_QAT_THRESHOLD": "0.5",
    }  # fmt: skip


@pytest.fixture(scope="session")
def tiny_hp(tiny) -> tg.Hyperparameters:
    """The same as settings."""
    return tg.Hyperparameters.from_env(tiny)


def draw(name: str, shape, seed: int = 0) -> torch.Tensor:
    """Normal values that depend on a name and a shape, not on what else was drawn."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.default_rng(key).standard_normal(tuple(shape)).astype(np.float32))


def random_model(hp: tg.Hyperparameters, seed: int = 0, spread: float = 0.1) -> tg.GPT:
    """A model with every parameter random, so that no zero hides a part; a new one moves no other's draw.

    Around what a constant starts from: a scale near zero would silence what it scales.
    """
    model = tg.GPT(hp)
    with torch.no_grad():
        for name, p in model.named_parameters():
            start = p.flatten()[0] if len(p.unique()) == 1 else 0.0
            p.copy_(start + spread * draw(name, p.shape, seed))
    return model


SCRIPT = ROOT / "train_gpt.py"


def run_script(
    folder: Path, env: dict[str, str], processes: int = 1, timeout: float = 300, script: Path = SCRIPT
) -> subprocess.CompletedProcess:
    """train_gpt.py through the command line in a folder of its own, under torchrun for several processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    kept = "PATH HOME LD_LIBRARY_PATH CC CXX CUDA_HOME CUDA_VISIBLE_DEVICES".split()
    clean = {key: os.environ[key] for key in kept if key in os.environ}
    return subprocess.run(
        [*command, str(script)], cwd=folder, env=clean | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def run_here(folder: Path, env: dict[str, str]) -> int:
    """The script's main in this process, in a folder of its own, with this environment; its exit status."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with (
        mock.patch.dict(os.environ, kept | env, clear=True),
        mock.patch.object(sys, "argv", ["train_gpt.py"]),
        contextlib.chdir(folder),
    ):
        return tg.main()


def result_of(folder: Path, run_id: str = "run") -> dict:
    """result.json of a run."""
    return json.loads((folder / "logs" / run_id / "result.json").read_text())
