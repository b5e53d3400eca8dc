"""Settings: presets, the submissions' names, and every mistake reported at once."""

import dataclasses
import os

import pytest

import train_gpt as tg

from_env = tg.Hyperparameters.from_env

# The run lines as #606 and #601 published them. #601's omits the wall clock that its schedule needs off.
RUN_606 = {
    "SEED": "42", "SOFT_ROUND_QAT": "1", "INT6_LAST_N": "0", "PRUNE_PCT": "0.02", "EVAL_STRIDE": "32",
    "SKIP_SLIDING": "1", "TTT_EPOCHS": "3", "TTT_LR": "0.0001", "TTT_OPTIMIZER": "adamw",
    "TTT_FREEZE_BLOCKS": "2", "TTT_CHUNK_TOKENS": "131072", "TTT_TEMPERATURE": "0.98", "PPM_ALPHA": "1.0",
    "BYTE_WEIGHTED_TTT": "0", "USE_CACHE": "0", "ADAPTIVE_LR": "0", "USE_MIXER": "0"}
RUN_601 = {
    "TORCHDYNAMO_DISABLE": "1", "NUM_LAYERS": "11", "MODEL_DIM": "512", "NUM_HEADS": "8", "NUM_KV_HEADS": "4",
    "MLP_MULT": "3", "TRAIN_SEQ_LEN": "1024", "TRAIN_BATCH_TOKENS": "524288", "ITERATIONS": "9500",
    "WARMDOWN_ITERS": "3500", "WARMUP_STEPS": "20", "GRAD_ACCUM_STEPS": "8", "MATRIX_LR": "0.025",
    "SCALAR_LR": "0.025", "TIED_EMBED_LR": "0.035", "WEIGHT_DECAY_MUON": "0.04", "WEIGHT_DECAY_ADAM": "0.04",
    "SMEAR_GATE": "1", "BIGRAM_HASH": "1", "BIGRAM_BUCKETS": "1024", "BIGRAM_DIM": "128", "ORTHO_INIT": "1",
    "XSA_LAYERS": "4", "PARTIAL_ROPE_DIMS": "16", "LN_SCALE": "1", "LOGIT_SOFTCAP": "30",
    "GATED_ATTENTION": "1", "VALUE_RESIDUAL": "1", "EMA_ENABLED": "1", "EMA_DECAY": "0.997",
    "SWA_ENABLED": "0", "LATE_QAT": "1", "LATE_QAT_THRESHOLD": "0.15", "QUANT_BITS": "6",
    "EVAL_SEQ_LEN": "1024", "EVAL_STRIDE": "128"}
# What else the two files read, with the value of the run: all of it may stand in somebody's environment.
REST_606 = {
    "DATA_PATH": "./data/datasets/fineweb10B_sp1024",
    "TOKENIZER_PATH": "./data/tokenizers/fineweb_1024_bpe.model",
    "VAL_BATCH_SIZE": "524288", "VAL_LOSS_EVERY": "4000", "TRAIN_LOG_EVERY": "500", "ITERATIONS": "20000",
    "WARMDOWN_ITERS": "3500", "WARMUP_STEPS": "20", "MAX_WALLCLOCK_SECONDS": "600",
    "TRAIN_BATCH_TOKENS": "786432", "TRAIN_SEQ_LEN": "2048", "EVAL_SEQ_LEN": "2048", "NUM_LAYERS": "11",
    "MODEL_DIM": "512", "NUM_HEADS": "8", "NUM_KV_HEADS": "8", "MLP_MULT": "3.5", "VOCAB_SIZE": "1024",
    "TIE_EMBEDDINGS": "1", "TIED_EMBED_INIT_STD": "0.005", "ROPE_BASE": "10000", "ROPE_DIMS": "16",
    "QK_GAIN_INIT": "1.5", "LOGIT_SOFTCAP": "30", "TIED_EMBED_LR": "0.035", "MATRIX_LR": "0.025",
    "SCALAR_LR": "0.025", "EMBED_LR": "0.6", "HEAD_LR": "0.008", "MUON_MOMENTUM": "0.99",
    "MUON_MOMENTUM_WARMUP_START": "0.92", "MUON_MOMENTUM_WARMUP_STEPS": "1500", "MUON_BACKEND_STEPS": "5",
    "BETA1": "0.9", "BETA2": "0.95", "ADAM_EPS": "1e-8", "MUON_BETA2": "0.95", "MUON_WD": "0.04",
    "ADAM_WD": "0.04", "GRAD_CLIP_NORM": "0.3", "SWA_EVERY": "50", "QAT_ENABLED": "0",
    "LATE_QAT_THRESHOLD": "0.5", "BIGRAM_VOCAB_SIZE": "8192", "BIGRAM_DIM": "128", "XSA_LAST_N": "11",
    "LN_SCALE": "1", "DTG_ENABLED": "0", "VE_ENABLED": "1", "VE_DIM": "128", "VE_LAYERS": "9,10",
    "CACHE_ALPHA": "0.3", "ADAPTIVE_LR_MAX": "3.0", "MIXER_ETA": "0.1", "USE_POLYAK": "0",
    "POLYAK_DECAY": "0.998", "QTTT": "0"}
REST_601 = {
    "MAX_WALLCLOCK_SECONDS": "0", "MUON_MOMENTUM": "0.99", "MUON_BACKEND_STEPS": "5", "GRAD_CLIP_NORM": "0.3",
    "HYPER_CONNECTIONS": "0", "ADAPTIVE_VR": "0", "TTT_GA_GUIDED": "0", "CACHE_MIXTURE": "0", "OGD_BIAS": "0",
    "KV_CACHE_LEN": "0", "VR_V0_FP16": "0", "GPTQ_LITE_SEARCH": "0", "GPTQ_LITE_GRID": "20",
    "GPTQ_CALIB_BATCHES": "100", "FULL_GPTQ": "1", "INT5_MLP": "1", "GPTQ_LITE": "1", "LOAD_ARTIFACT": ""}
ORDINARY = (
    "PATH HOME USER LOGNAME SHELL SHLVL TERM COLORTERM LANG LC_ALL PWD OLDPWD TMPDIR TZ MAIL EDITOR PAGER "
    "LESS DISPLAY HOSTNAME COLUMNS LINES PS1 _ CC CXX CFLAGS LD_LIBRARY_PATH PYTHONPATH "
    "PYTHONUNBUFFERED VIRTUAL_ENV CONDA_PREFIX CUDA_VISIBLE_DEVICES CUDA_HOME NCCL_DEBUG "
    "OMP_NUM_THREADS MKL_NUM_THREADS TORCH_LOGS TORCHDYNAMO_DISABLE TORCHINDUCTOR_CACHE_DIR "
    "PYTORCH_CUDA_ALLOC_CONF HF_HOME HF_TOKEN WANDB_MODE "
    "SSH_CONNECTION XDG_RUNTIME_DIR SLURM_JOB_ID GITHUB_RUN_ID CI DEBUG http_proxy HTTPS_PROXY NO_PROXY "
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME "
    "ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT "
    "TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE "
    "TORCH_NCCL_ASYNC_ERROR_HANDLING"
).split()
FIELDS = [f for f in dataclasses.fields(tg.Hyperparameters) if f.metadata]


def lines(env):
    """The lines of the error that an environment makes."""
    with pytest.raises(ValueError) as caught:
        from_env(env)
    return str(caught.value).splitlines()


# ----------------------------------------------------------------------------------------------------------
# Presets and purity
# ----------------------------------------------------------------------------------------------------------


def test_nothing_given_is_606():
    hp = from_env({})
    assert hp == from_env({"PRESET": "pr606"}) == tg.Hyperparameters() and hp.preset == "pr606"
    assert tg.PRESETS["pr606"] == {} and set(tg.PRESETS) == {"pr606", "pr601", "smoke"}


def test_only_the_mapping_counts(monkeypatch):
    """Nothing is read from the process's environment, and nothing is written anywhere."""
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("PRESET", "smoke")
    monkeypatch.setenv("NUM_LAYRES", "2")
    before, env = dict(os.environ), {"ITERATIONS": "12"}
    hp = from_env(env)
    assert (hp.seed, hp.preset, hp.iterations) == (1337, "pr606", 12)
    assert env == {"ITERATIONS": "12"} and dict(os.environ) == before


def test_environment_over_preset_over_default():
    for preset, values in tg.PRESETS.items():
        hp = from_env({"PRESET": preset})
        for f in FIELDS:
            expected = preset if f.name == "preset" else values.get(f.name, f.default)
            assert getattr(hp, f.name) == expected, f.name
    assert from_env({"PRESET": "pr601", "XSA_LAST_N": "2"}).xsa_last_n == 2
    assert from_env({"XSA_LAST_N": "2", "PRESET": "pr601"}).num_kv_heads == 4


def test_presets_list_only_differences():
    for values in tg.PRESETS.values():
        for name, value in values.items():
            default = tg.Hyperparameters.__dataclass_fields__[name].default
            assert value != default and type(value) is type(default), name


def test_the_presets_are_the_two_submissions():
    a, b = from_env({}), from_env({"PRESET": "pr601"})
    both = [("num_layers", 11), ("model_dim", 512), ("num_heads", 8), ("rope_dims", 16), ("embed_bits", 8),
            ("warmdown_iters", 3500), ("averaging", "ema"), ("ema_decay", 0.997), ("quantizer", "gptq")]
    assert all(getattr(hp, name) == value for hp in (a, b) for name, value in both)
    assert (a.attn_bits, a.mlp_bits, b.attn_bits, b.mlp_bits) == (5, 5, 6, 5)
    assert (a.mlp_slope, b.mlp_slope, a.rope_ntk_reference, b.rope_ntk_reference) == (0.5, 0.0, 1024, 0)
    assert (a.soft_round_qat, b.soft_round_qat, a.late_qat, b.late_qat) == (True, False, True, True)
    assert (a.max_wallclock_seconds, b.max_wallclock_seconds, b.iterations) == (600.0, 0.0, 9500)
    assert (a.skip_sliding, a.ttt_enabled, b.skip_sliding, b.ttt_enabled) == (True, True, False, False)
    assert (a.muon_row_norm, b.muon_row_norm, a.ttt_temperature) == (False, True, 0.98)
    assert (a.ve_enabled, a.value_residual, a.gated_attention) == (True, False, False)
    assert (b.ve_enabled, b.value_residual, b.gated_attention) == (False, True, True)


def test_smoke_switches_every_technique_on_and_counts_steps():
    hp = from_env({"PRESET": "smoke"})
    assert hp.value_residual and hp.gated_attention and hp.ve_enabled and hp.xsa_last_n
    assert hp.bigram_vocab_size and hp.smear_gate and hp.late_qat and hp.soft_round_qat
    assert hp.averaging == "ema" and hp.ttt_enabled and hp.smear_reset_at_bos
    assert not any(from_env({"PRESET": other}).smear_reset_at_bos for other in ("pr606", "pr601"))
    assert hp.quantizer == "gptq" and (hp.attn_bits, hp.mlp_bits) == (5, 5) and hp.prune_pct > 0
    assert not hp.skip_sliding and hp.max_wallclock_seconds == 0 and 2 <= hp.num_layers <= 4


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_env({}).seed = 1


# ----------------------------------------------------------------------------------------------------------
# The submissions' names
# ----------------------------------------------------------------------------------------------------------


def test_the_run_line_of_606_is_the_preset():
    hp = from_env(RUN_606)
    assert hp.changed() == {"seed": 42}
    assert dataclasses.replace(hp, seed=1337) == from_env({})
    hp = from_env(RUN_606 | REST_606)
    assert hp.changed() == {"seed": 42}
    assert hp.ignored == ("ADAPTIVE_LR_MAX", "CACHE_ALPHA", "EMBED_LR", "HEAD_LR", "MIXER_ETA", "MUON_BETA2")


def test_the_run_line_of_601_is_its_preset():
    hp = from_env(RUN_601 | {"PRESET": "pr601"})
    assert hp.changed() == {"grad_accum_steps": 8} and hp.ignored == ()
    hp = from_env(RUN_601 | REST_601 | {"PRESET": "pr601"})
    assert hp.changed() == {"grad_accum_steps": 8}
    assert hp.ignored == ("GPTQ_CALIB_BATCHES", "GPTQ_LITE_GRID")


def test_the_run_line_of_601_over_another_preset():
    hp = from_env(RUN_601)
    assert (hp.num_kv_heads, hp.mlp_mult, hp.train_seq_len, hp.iterations) == (4, 3.0, 1024, 9500)
    assert (hp.bigram_vocab_size, hp.xsa_last_n, hp.rope_dims, hp.attn_bits) == (1024, 4, 16, 6)
    assert (hp.muon_wd, hp.adam_wd, hp.late_qat_threshold, hp.averaging) == (0.04, 0.04, 0.15, "ema")
    assert hp.value_residual and hp.gated_attention


ALIASES = [
    ("BIGRAM_BUCKETS", "512", "bigram_vocab_size", 512), ("XSA_LAYERS", "3", "xsa_last_n", 3),
    ("PARTIAL_ROPE_DIMS", "8", "rope_dims", 8), ("WEIGHT_DECAY_MUON", "0.02", "muon_wd", 0.02),
    ("WEIGHT_DECAY_ADAM", "0.01", "adam_wd", 0.01), ("SGD_TTT_LR", "0.004", "ttt_lr", 0.004),
    ("SGD_TTT_MOMENTUM", "0.8", "ttt_momentum", 0.8), ("SGD_TTT_EPOCHS", "5", "ttt_epochs", 5),
    ("SGD_TTT_SEQ_LEN", "1024", "ttt_seq_len", 1024), ("SGD_TTT_PARAM_SET", "all", "ttt_params", "all"),
    ("TTT_CHUNK_SIZE", "65536", "ttt_chunk_tokens", 65536), ("TTT_PERLAYER_LR", "1", "ttt_perlayer_lr", True),
    ("TTT_COSINE_LR", "1", "ttt_schedule", "chunk"), ("TTT_COSINE_LR", "0", "ttt_schedule", "constant"),
    ("GPTQ_LITE", "1", "quantizer", "gptq_lite"), ("FULL_GPTQ", "1", "quantizer", "gptq"),
    ("INT5_MLP", "1", "mlp_bits", 5), ("INT5_MLP", "0", "mlp_bits", 6), ("QUANT_BITS", "6", "attn_bits", 6)]


@pytest.mark.parametrize(("name", "text", "field", "value"), ALIASES)
def test_aliases_set_the_field(name, text, field, value):
    given = getattr(from_env({name: text}), field)
    assert given == value and type(given) is type(value)


def test_full_gptq_goes_before_gptq_lite():
    assert from_env({"FULL_GPTQ": "1", "GPTQ_LITE": "1"}).quantizer == "gptq"
    assert from_env({"GPTQ_LITE": "1", "FULL_GPTQ": "0"}).quantizer == "gptq_lite"
    assert from_env({"GPTQ_LITE": "0", "FULL_GPTQ": "0"}).quantizer == "rtn"
    assert from_env({"FULL_GPTQ": "0"}).quantizer == "rtn"


def test_the_bigram_switch_turns_it_off():
    assert from_env({"BIGRAM_HASH": "0"}).bigram_vocab_size == 0
    assert from_env({"BIGRAM_HASH": "1"}).bigram_vocab_size == 8192


@pytest.mark.parametrize("env", [
    {"XSA_LAYERS": "4", "XSA_LAST_N": "5"}, {"BIGRAM_BUCKETS": "512", "BIGRAM_VOCAB_SIZE": "1024"},
    {"PARTIAL_ROPE_DIMS": "16", "ROPE_DIMS": "8"}, {"WEIGHT_DECAY_MUON": "0.02", "MUON_WD": "0.04"},
    {"SGD_TTT_LR": "0.002", "TTT_LR": "0.001"}, {"TTT_CHUNK_SIZE": "2048", "TTT_CHUNK_TOKENS": "4096"},
    {"FULL_GPTQ": "1", "QUANTIZER": "rtn"}, {"GPTQ_LITE": "1", "QUANTIZER": "gptq"},
    {"INT5_MLP": "1", "MLP_BITS": "6"}, {"TTT_COSINE_LR": "1", "TTT_SCHEDULE": "run"}])
def test_two_names_that_say_different_things(env):
    assert len(complaint := lines(env)) == 1 and all(name in complaint[0] for name in env)


def test_two_names_that_say_the_same():
    hp = from_env({"XSA_LAYERS": "4", "XSA_LAST_N": "4", "MUON_WD": "0.040", "WEIGHT_DECAY_MUON": "0.04"})
    assert hp.xsa_last_n == 4 and hp.muon_wd == 0.04


@pytest.mark.parametrize(("env", "fine"), [
    ({"EMA_ENABLED": "1"}, True), ({"SWA_ENABLED": "0"}, True), ({"EMA_ENABLED": "1",
    "SWA_ENABLED": "0"}, True),
    ({"EMA_ENABLED": "0"}, False), ({"SWA_ENABLED": "1", "AVERAGING": "swa"}, True),
    ({"SWA_ENABLED": "0", "AVERAGING": "swa"}, False), ({"EMA_ENABLED": "1", "AVERAGING": "swa"}, False),
    ({"EMA_ENABLED": "1", "SWA_ENABLED": "1", "AVERAGING": "best"}, True),
    ({"EMA_ENABLED": "0", "AVERAGING": "none"}, True), ({"EMA_ENABLED": "1", "AVERAGING": "none"}, False)])
def test_averaging_switches_may_repeat_and_not_contradict(env, fine):
    if fine:
        assert from_env(env).averaging == env.get("AVERAGING", "ema")
    else:
        assert "AVERAGING" in lines(env)[0]


NOT_CARRIED = {
    "USE_MIXER": ("0", "1"), "USE_CACHE": ("0", "1"), "BYTE_WEIGHTED_TTT": ("0", "1"), "ADAPTIVE_LR": ("0",
    "1"),
    "PPM_ALPHA": ("1.0", "0.85"), "QTTT": ("0", "1"), "DTG_ENABLED": ("0", "1"), "HYPER_CONNECTIONS": ("0",
    "1"),
    "ADAPTIVE_VR": ("0", "1"), "TTT_GA_GUIDED": ("0", "1"), "CACHE_MIXTURE": ("0", "1"), "OGD_BIAS": ("0",
    "1"),
    "KV_CACHE_LEN": ("0", "256"), "VR_V0_FP16": ("0", "1"), "GPTQ_LITE_SEARCH": ("0", "1"),
    "TIE_EMBEDDINGS": ("1", "0"), "TTT_LEGAL": ("1", "0"), "LOAD_ARTIFACT": ("", "model.ptz")}


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_what_is_not_carried_may_be_off(name):
    off, on = NOT_CARRIED[name]
    assert from_env({name: off}) == from_env({name: ""}) == from_env({})
    assert len(complaint := lines({name: on})) == 1 and f"{name}={on}" in complaint[0]


def test_off_is_a_number_and_not_a_spelling():
    assert from_env({"PPM_ALPHA": "1", "KV_CACHE_LEN": "0"}) == from_env({})


def test_names_without_effect_are_recorded():
    given = {"MUON_BETA2": "0.95", "EMBED_LR": "0.6", "HEAD_LR": "0.008", "GPTQ_CALIB_BATCHES": "100"}
    hp = from_env(given)
    assert set(hp.ignored) == set(given) and list(hp.ignored) == sorted(hp.ignored)
    assert hp.changed() == {} and from_env({}).ignored == ()


# ----------------------------------------------------------------------------------------------------------
# Misspelt names
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "meant"), [
    ("NUM_LAYRES", "NUM_LAYERS"), ("NUMLAYERS", "NUM_LAYERS"), ("ITERATION", "ITERATIONS"), ("SEEED", "SEED"),
    ("VOCAB_SIZES", "VOCAB_SIZE"), ("BIGRAM_BUCKET", "BIGRAM_BUCKETS"), ("MATRIX_LT", "MATRIX_LR"),
    ("DATAPATH", "DATA_PATH"), ("PRSET", "PRESET"), ("EMBED_LRR", "EMBED_LR"), ("NPROCS", "NPROC"),
    ("TTT_EPOCH", "TTT_EPOCHS"), ("USE_MIXERS", "USE_MIXER"), ("MODEL_DIMM", "MODEL_DIM")])
def test_one_or_two_edits_are_an_error_with_a_hint(name, meant):
    assert len(complaint := lines({name: "1"})) == 1
    assert name in complaint[0] and complaint[0].endswith(f"{meant}?")


@pytest.mark.parametrize("prefix", ["TTT_", "GPTQ_", "QAT_", "EMA_", "SWA_", "MUON_", "ADAM_"])
def test_own_prefixes_are_an_error(prefix):
    assert prefix + "COMPLETELY_UNHEARD_OF" in lines({prefix + "COMPLETELY_UNHEARD_OF": "1"})[0]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_variables_are_not(name):
    assert from_env({name: "whatever"}) == from_env({})


def test_names_of_the_other_programs_are_known():
    env = {"SEEDS": "42,7", "NPROC": "8", "TORCH_INDEX_URL": "https://x", "HF_ENDPOINT": "http://localhost",
           "MATCHED_FINEWEB_REPO_ID": "a/b", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "datasets"}
    hp = from_env(env)
    assert hp == from_env({}) and not hp.changed()


def test_three_edits_are_a_different_name():
    assert from_env({"ITERXXXIONS": "1", "MY_OWN_THING": "1", "LEARNING_RATE": "1"}) == from_env({})


# ----------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------


def test_every_error_at_once():
    complaint = lines({
        "NUM_LAYRES": "3", "SEED": "abc", "USE_MIXER": "1", "XSA_LAYERS": "1", "XSA_LAST_N": "2",
        "MATRIX_LR": "-1",
        "AVERAGING": "median", "MODEL_DIM": "500", "TTT_FANCY": "1", "STAGES": "train,dream",
        "SWA_ENABLED": "1"})
    for word in ("NUM_LAYRES", "SEED=abc", "USE_MIXER=1", "XSA_LAYERS", "MATRIX_LR", "AVERAGING=median is",
                 "MODEL_DIM must", "TTT_FANCY", "dream", "SWA_ENABLED"):
        assert sum(word in line for line in complaint) == 1, (word, complaint)
    assert len(complaint) == 10


def test_each_setting_that_must_be_positive_is_named():
    complaint = lines({"NUM_HEADS": "0", "TRAIN_SEQ_LEN": "0", "SWA_EVERY": "0"})
    assert len(complaint) == 3
    assert all(any(name in line for line in complaint) for name in ("NUM_HEADS", "TRAIN_SEQ_LEN",
        "SWA_EVERY"))


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-0.5"])
def test_numbers_that_are_none(text):
    """One line, about this setting alone."""
    assert len(complaint := lines({"TTT_LR": text})) == 1 and complaint[0].startswith("TTT_LR=")


@pytest.mark.parametrize(("name", "text"), [
    ("ITERATIONS", "1e3"), ("ITERATIONS", "12.5"), ("ITERATIONS", "ten"), ("MATRIX_LR", "0,1"),
    ("LN_SCALE", "yes"), ("LN_SCALE", "2"), ("VE_LAYERS", "9,x"), ("VE_LAYERS", "9.5"), ("SKIP_SLIDING",
    "on"),
    ("EMA_ENABLED", "2"), ("FULL_GPTQ", "maybe"), ("TTT_COSINE_LR", "cos"), ("BIGRAM_BUCKETS", "many")])
def test_text_of_the_wrong_kind(name, text):
    assert any(f"{name}={text}" in line for line in lines({name: text}))


def test_kinds_of_values():
    hp = from_env({"LN_SCALE": "false", "TENSORBOARD": "True", "VE_LAYERS": "3, 4", "MLP_MULT": "2",
        "SEED": "5"})
    assert (hp.ln_scale, hp.tensorboard, hp.ve_layers, hp.mlp_mult, hp.seed) == (False, True, (3, 4), 2.0, 5)
    for f in FIELDS:
        assert type(getattr(hp, f.name)) is type(f.default), f.name


def test_an_empty_value_is_no_value():
    assert from_env({"SEED": "", "PRESET": "", "XSA_LAYERS": "", "FULL_GPTQ": "",
        "USE_CACHE": ""}) == from_env({})


@pytest.mark.parametrize(("env", "word"), [
    ({"MODEL_DIM": "500"}, "MODEL_DIM"), ({"NUM_KV_HEADS": "3"}, "NUM_KV_HEADS"), ({"ROPE_DIMS": "15"},
    "ROPE_DIMS"),
    ({"ROPE_DIMS": "66"}, "ROPE_DIMS"), ({"ROPE_DIMS": "2"}, "ROPE_DIMS"), ({"VOCAB_SIZE": "65537"},
    "VOCAB_SIZE"),
    ({"BIGRAM_VOCAB_SIZE": "1"}, "BIGRAM_VOCAB_SIZE"), ({"VE_LAYERS": "11"}, "VE_LAYERS"),
    ({"VE_LAYERS": ","}, "VE_LAYERS"), ({"NUM_LAYERS": "9"}, "VE_LAYERS"), ({"VE_LAYERS": "-1"}, "VE_LAYERS"),
    ({"TRAIN_BATCH_TOKENS": "3000"}, "TRAIN_BATCH_TOKENS"), ({"EVAL_STRIDE": "0"}, "EVAL_STRIDE"),
    ({"EVAL_STRIDE": "2049"}, "EVAL_STRIDE"), ({"TTT_CHUNK_TOKENS": "3000"}, "TTT_CHUNK_TOKENS"),
    ({"TTT_SEQ_LEN": "3000"}, "TTT_CHUNK_TOKENS"), ({"TTT_FREEZE_BLOCKS": "12"}, "TTT_FREEZE_BLOCKS"),
    ({"ATTN_BITS": "1"}, "ATTN_BITS"), ({"MLP_BITS": "9"}, "MLP_BITS"), ({"EMBED_BITS": "16"}, "EMBED_BITS"),
    ({"PRUNE_PCT": "1"}, "PRUNE_PCT"), ({"ZSTD_LEVEL": "23"}, "ZSTD_LEVEL"), ({"MUON_MOMENTUM": "1"},
    "MUON_MOMENTUM"),
    ({"EMA_DECAY": "1"}, "EMA_DECAY"), ({"STAGES": "train,,evaluate"}, "STAGES"), ({"STAGES": "score"},
    "STAGES"),
    ({"ARTIFACT": "a.bin"}, "ARTIFACT"), ({"QUANTIZER": "awq"}, "QUANTIZER"), ({"DEVICE": "tpu"}, "DEVICE"),
    ({"TTT_OPTIMIZER": "lion"}, "TTT_OPTIMIZER"), ({"COMPILE": "yes"}, "COMPILE"), ({"ITERATIONS": "0"},
    "ITERATIONS"),
    ({"SEED": "-1"}, "SEED"), ({"ARTIFACT_LIMIT": "0"}, "ARTIFACT_LIMIT"), ({"TTT_EPOCHS": "0"},
    "TTT_EPOCHS"),
    # What PyTorch or NumPy would refuse later with a traceback, or turn into NaN.
    ({"BETA1": "1"}, "BETA1"), ({"BETA2": "1.5"}, "BETA2"), ({"SEED": str(2**32)}, "SEED"),
    ({"LOGIT_SOFTCAP": "0"}, "LOGIT_SOFTCAP"), ({"VE_LAYERS": "9,9"}, "VE_LAYERS")])
def test_values_that_no_run_can_use(env, word):
    assert len(complaint := lines(env)) == 1 and word in complaint[0]


@pytest.mark.parametrize("env", [
    {"VOCAB_SIZE": "65536"}, {"EVAL_STRIDE": "2048"}, {"TTT_FREEZE_BLOCKS": "11"}, {"ATTN_BITS": "2",
    "MLP_BITS": "8"},
    {"PRUNE_PCT": "0"}, {"ROPE_DIMS": "64"}, {"ROPE_DIMS": "0"}, {"BIGRAM_VOCAB_SIZE": "0"},
    {"BIGRAM_VOCAB_SIZE": "2"},
    {"VE_ENABLED": "0", "NUM_LAYERS": "4"}, {"VE_LAYERS": "0"}, {"XSA_LAST_N": "0"},
    {"MAX_WALLCLOCK_SECONDS": "0"},
    {"GRAD_CLIP_NORM": "0"}, {"STAGES": "evaluate", "ARTIFACT": "a.bin"}, {"STAGES": "quantize,evaluate"},
    {"TTT_ENABLED": "0", "SKIP_SLIDING": "0"}, {"SEED": str(2**32 - 1)}, {"SEED": "0"},
    {"WARMUP_STEPS": "0"}])
def test_values_at_the_edge(env):
    for name, text in env.items():
        value = getattr(from_env(env), name.lower())
        like = tg.Hyperparameters.__dataclass_fields__[name.lower()].default
        special = {bool: lambda t: t == "1", tuple: lambda t: tuple(map(int, t.split(",")))}
        assert value == special.get(type(like), type(like))(text)


def test_a_run_id_names_a_folder_under_logs():
    assert from_env({"RUN_ID": "my-run_1.2"}).run_id == "my-run_1.2"
    for text in ("../elsewhere", "/tmp/elsewhere", "a/../../b", ".."):
        assert any("RUN_ID" in line for line in lines({"RUN_ID": text}))


def test_an_unknown_preset_names_the_known_ones():
    complaint = "\n".join(lines({"PRESET": "pr607"}))
    assert all(name in complaint for name in ("PRESET=pr607", "pr606", "pr601", "smoke"))


# ----------------------------------------------------------------------------------------------------------
# What is said about settings
# ----------------------------------------------------------------------------------------------------------


def test_changed_lists_what_differs_from_the_preset():
    env = {"PRESET": "smoke", "SEED": "3", "VE_LAYERS": "1", "LATE_QAT": "0", "XSA_LAYERS": "2",
        "ITERATIONS": "600"}
    usual = from_env({"PRESET": "smoke"}).iterations
    expected = {"seed": 3, "ve_layers": (1,), "late_qat": False, "xsa_last_n": 2}
    assert from_env(env | {"ITERATIONS": str(usual)}).changed() == expected
    assert from_env({"PRESET": "smoke"}).changed() == {}


def test_every_setting_is_a_row_of_the_table():
    text = tg.Hyperparameters.table()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0][0] == "name" and rows[0][-1] == "meaning" and set(rows[0][1:-1]) == set(tg.PRESETS)
    assert all(set("".join(row)) <= set("-:") for row in rows[1:2]) and len({len(row) for row in rows}) == 1
    table = {row[0]: row for row in rows[2:]}
    assert set(table) == {f.name.upper() for f in FIELDS} - {"PRESET"} and len(table) == len(rows) - 2
    for column, preset in enumerate(rows[0][1:-1], 1):
        # The table's own cells, given back as settings, are the preset.
        cells = {name: row[column] for name, row in table.items() if row[column] != '""'}
        hp = from_env(cells | {"PRESET": preset})
        assert hp.changed() == {}
        assert all(getattr(hp, f.name) == "" for f in FIELDS if f.name.upper() not in [*cells, "PRESET"])
    for f in FIELDS:
        assert len(f.metadata["meaning"]) > 2
        assert f.name == "preset" or table[f.name.upper()][-1] == f.metadata["meaning"]
