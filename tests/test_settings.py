"""Settings: presets, the submissions' names, and every mistake reported at once."""

import dataclasses
import os

import pytest
from conftest import run_here

import train_gpt as tg

from_env = tg.Hyperparameters.from_env
FIELDS = tg.Hyperparameters.fields()
SWITCHES = {name: setting.split()[0] for name, setting in tg.SPELLINGS.items() if " " in setting}
OFF = {name: f.metadata["off"] for name, f in FIELDS.items() if f.metadata["off"] is not None}


def environment(text):
    """NAME=value words as a mapping."""
    return dict(word.split("=") for word in text.split())


# The run lines as #606 and #601 published them. #601's omits the wall clock that its schedule needs off.
RUN_606 = environment("""
    SEED=42 SOFT_ROUND_QAT=1 INT6_LAST_N=0 PRUNE_PCT=0.02 EVAL_STRIDE=32 SKIP_SLIDING=1 TTT_EPOCHS=3
    TTT_LR=0.0001 TTT_OPTIMIZER=adamw TTT_FREEZE_BLOCKS=2 TTT_CHUNK_TOKENS=131072 TTT_TEMPERATURE=0.98
    PPM_ALPHA=1.0 BYTE_WEIGHTED_TTT=0 USE_CACHE=0 ADAPTIVE_LR=0 USE_MIXER=0
""")
RUN_601 = environment("""
    TORCHDYNAMO_DISABLE=1 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3
    TRAIN_SEQ_LEN=1024 TRAIN_BATCH_TOKENS=524288 ITERATIONS=9500 WARMDOWN_ITERS=3500 WARMUP_STEPS=20
    GRAD_ACCUM_STEPS=8 MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 WEIGHT_DECAY_MUON=0.04
    WEIGHT_DECAY_ADAM=0.04 SMEAR_GATE=1 BIGRAM_HASH=1 BIGRAM_BUCKETS=1024 BIGRAM_DIM=128 ORTHO_INIT=1
    XSA_LAYERS=4 PARTIAL_ROPE_DIMS=16 LN_SCALE=1 LOGIT_SOFTCAP=30 GATED_ATTENTION=1 VALUE_RESIDUAL=1
    EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=0 LATE_QAT=1 LATE_QAT_THRESHOLD=0.15 QUANT_BITS=6
    EVAL_SEQ_LEN=1024 EVAL_STRIDE=128
""")
# What else the two files read, with the value of the run: all of it may stand in somebody's environment.
REST_606 = environment("""
    DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model
    VAL_BATCH_SIZE=524288 VAL_LOSS_EVERY=4000 TRAIN_LOG_EVERY=500 ITERATIONS=20000 WARMDOWN_ITERS=3500
    WARMUP_STEPS=20 MAX_WALLCLOCK_SECONDS=600 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048
    EVAL_SEQ_LEN=2048 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=8 MLP_MULT=3.5
    VOCAB_SIZE=1024 TIE_EMBEDDINGS=1 TIED_EMBED_INIT_STD=0.005 ROPE_BASE=10000 ROPE_DIMS=16
    QK_GAIN_INIT=1.5 LOGIT_SOFTCAP=30 TIED_EMBED_LR=0.035 MATRIX_LR=0.025 SCALAR_LR=0.025 EMBED_LR=0.6
    HEAD_LR=0.008 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
    MUON_BACKEND_STEPS=5 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 MUON_BETA2=0.95 MUON_WD=0.04 ADAM_WD=0.04
    GRAD_CLIP_NORM=0.3 SWA_EVERY=50 QAT_ENABLED=0 LATE_QAT_THRESHOLD=0.5 BIGRAM_VOCAB_SIZE=8192
    BIGRAM_DIM=128 XSA_LAST_N=11 LN_SCALE=1 DTG_ENABLED=0 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10
    CACHE_ALPHA=0.3 ADAPTIVE_LR_MAX=3.0 MIXER_ETA=0.1 USE_POLYAK=0 POLYAK_DECAY=0.998 QTTT=0
""")
REST_601 = environment("""
    MAX_WALLCLOCK_SECONDS=0 MUON_MOMENTUM=0.99 MUON_BACKEND_STEPS=5 GRAD_CLIP_NORM=0.3
    HYPER_CONNECTIONS=0 ADAPTIVE_VR=0 TTT_GA_GUIDED=0 CACHE_MIXTURE=0 OGD_BIAS=0 KV_CACHE_LEN=0
    VR_V0_FP16=0 GPTQ_LITE_SEARCH=0 GPTQ_LITE_GRID=20 GPTQ_CALIB_BATCHES=100 FULL_GPTQ=1 INT5_MLP=1
    GPTQ_LITE=1 LOAD_ARTIFACT=
""")
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


def lines(env):
    """The lines of the error that an environment makes."""
    with pytest.raises(ValueError) as caught:
        from_env(env)
    return str(caught.value).splitlines()


def outcome(env):
    """The settings, or what is wrong."""
    try:
        return from_env(env)
    except tg.UserError as error:
        return str(error)


# ----------------------------------------------------------------------------------------------------------
# What a field knows
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_carries_what_its_values_satisfy(name):
    """Scope, meaning, bounds or choices; the default, every preset's value and the off value lie within."""
    f, known = FIELDS[name], FIELDS[name].metadata
    assert known["scope"] in tg.SCOPES and len(known["meaning"]) > 2
    values = [f.default, *(given[name] for given in tg.PRESETS.values() if name in given)]
    values += [OFF[name]] if name in OFF else []
    assert len({type(value) for value in values}) == 1
    if known["choices"]:
        assert set(values) <= set(known["choices"]) and isinstance(f.default, str)
    elif isinstance(f.default, (int, float)):
        low, high = map(float, known["within"][1:-1].split(","))
        assert known["within"][0] + known["within"][-1] in ("[]", "[)", "(]", "()") and 0 <= low < high
        assert all(low <= value <= high for value in values)
        assert low not in values or known["within"][0] == "["
        assert high not in values or known["within"][-1] == "]"


def test_scopes_divide_the_settings():
    parts = [tg.Hyperparameters.fields(scope) for scope in tg.SCOPES]
    assert sum(map(len, parts)) == len(FIELDS) and set().union(*parts) == set(FIELDS) and all(parts)
    both = {name for name, f in FIELDS.items() if f.metadata["scope"] in ("model", "score")}
    assert set(tg.Hyperparameters.fields("model", "score")) == both
    assert {"vocab_size", "xsa_last_n", "ve_layers"} <= set(tg.Hyperparameters.fields("model"))


# What the small presets have on, between them all that there is.
ON = {preset: {name: off for name, off in OFF.items() if getattr(from_env({"PRESET": preset}), name) != off}
      for preset in ("smoke", "pr1855_smoke")}  # fmt: skip


def test_the_small_presets_switch_every_technique_on_and_count_steps():
    assert ON["smoke"] | ON["pr1855_smoke"] == OFF
    for preset, layers in (("smoke", 3), ("pr1855_smoke", 5)):
        hp = from_env({"PRESET": preset})
        assert (hp.num_layers, hp.skip_sliding, hp.max_wallclock_seconds) == (layers, False, 0)


@pytest.mark.parametrize(("preset", "name"), [(preset, name) for preset in ON for name in ON[preset]])
def test_every_technique_can_be_switched_off_alone(preset, name):
    assert tg.changed(from_env({"PRESET": preset, name.upper(): str(OFF[name])})) == {name: OFF[name]}


@pytest.mark.parametrize("preset", ON)
def test_all_techniques_can_be_switched_off_together(preset):
    env = {name.upper(): str(off) for name, off in OFF.items()}
    assert tg.changed(from_env(env | {"PRESET": preset})) == ON[preset]


# ----------------------------------------------------------------------------------------------------------
# Presets and purity
# ----------------------------------------------------------------------------------------------------------


def test_nothing_given_is_606():
    hp = from_env({})
    assert hp == from_env({"PRESET": "pr606"}) == tg.Hyperparameters() and hp.preset == "pr606"
    assert tg.PRESETS["pr606"] == {}


def test_only_the_mapping_counts(monkeypatch):
    """Nothing is read from the process's environment, and nothing is written anywhere."""
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("PRESET", "smoke")
    monkeypatch.setenv("NUM_LAYRES", "2")
    before, env = dict(os.environ), {"ITERATIONS": "12"}
    hp = from_env(env)
    assert (hp.seed, hp.preset, hp.iterations) == (1337, "pr606", 12)
    assert env == {"ITERATIONS": "12"} and dict(os.environ) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        hp.seed = 1


def test_environment_over_preset_over_default():
    for preset, values in tg.PRESETS.items():
        hp = from_env({"PRESET": preset})
        for name, f in FIELDS.items():
            assert getattr(hp, name) == (values | {"preset": preset}).get(name, f.default), name
            assert type(getattr(hp, name)) is type(f.default), name
    assert from_env({"PRESET": "pr601", "XSA_LAST_N": "2"}).xsa_last_n == 2
    assert from_env({"XSA_LAST_N": "2", "PRESET": "pr601"}).num_kv_heads == 4


def test_presets_list_only_differences():
    for values in tg.PRESETS.values():
        assert all(value != FIELDS[name].default for name, value in values.items())


def test_the_presets_are_the_two_submissions():
    a, b = from_env({}), from_env({"PRESET": "pr601"})
    both = [("num_layers", 11), ("model_dim", 512), ("num_heads", 8), ("rope_dims", 16), ("embed_bits", 8),
            ("warmdown_iters", 3500), ("averaging", "ema"), ("ema_decay", 0.997), ("quantizer", "gptq"),
            ("step_rule", "absmax"), ("smear_reset_at_bos", False)]  # fmt: skip
    assert all(getattr(hp, name) == value for hp in (a, b) for name, value in both)
    assert (a.attn_bits, a.mlp_bits, b.attn_bits, b.mlp_bits) == (5, 5, 6, 5)
    assert (a.mlp_slope, b.mlp_slope, a.rope_ntk_reference, b.rope_ntk_reference) == (0.5, 0.0, 1024, 0)
    assert (a.soft_round_qat, b.soft_round_qat) == (True, False)
    assert (a.late_qat_threshold, b.late_qat_threshold) == (0.5, 0.15)
    assert (a.max_wallclock_seconds, b.max_wallclock_seconds, b.iterations) == (600.0, 0.0, 9500)
    assert (a.skip_sliding, a.ttt_enabled, b.skip_sliding, b.ttt_enabled) == (True, True, False, False)
    assert (a.muon_row_norm, b.muon_row_norm, a.ttt_temperature) == (False, True, 0.98)
    assert (a.ve_enabled, a.value_residual, a.gated_attention) == (True, False, False)
    assert (b.ve_enabled, b.value_residual, b.gated_attention) == (False, True, True)


# ----------------------------------------------------------------------------------------------------------
# The submissions' names
# ----------------------------------------------------------------------------------------------------------


def test_the_run_line_of_606_is_the_preset():
    assert tg.changed(from_env(RUN_606)) == tg.changed(from_env(RUN_606 | REST_606)) == {"seed": 42}
    assert dataclasses.replace(from_env(RUN_606), seed=1337) == from_env({})


def test_the_run_line_of_601_is_its_preset():
    for env in (RUN_601, RUN_601 | REST_601):
        assert tg.changed(from_env(env | {"PRESET": "pr601"})) == {"grad_accum_steps": 8}


def test_the_run_line_of_601_over_another_preset():
    hp = from_env(RUN_601)
    assert (hp.num_kv_heads, hp.mlp_mult, hp.train_seq_len, hp.iterations) == (4, 3.0, 1024, 9500)
    assert (hp.bigram_vocab_size, hp.xsa_last_n, hp.rope_dims, hp.attn_bits) == (1024, 4, 16, 6)
    assert (hp.muon_wd, hp.adam_wd, hp.late_qat_threshold, hp.averaging) == (0.04, 0.04, 0.15, "ema")
    assert hp.value_residual and hp.gated_attention


# What each name says, next to QAT off, which GPTQ_LITE needs: the setting and its value, or nothing.
SPELT = [
    ("BIGRAM_BUCKETS", "512", "bigram_vocab_size", 512), ("XSA_LAYERS", "3", "xsa_last_n", 3),
    ("PARTIAL_ROPE_DIMS", "8", "rope_dims", 8), ("WEIGHT_DECAY_MUON", "0.02", "muon_wd", 0.02),
    ("WEIGHT_DECAY_ADAM", "0.01", "adam_wd", 0.01), ("SGD_TTT_LR", "0.004", "ttt_lr", 0.004),
    ("SGD_TTT_MOMENTUM", "0.8", "ttt_momentum", 0.8), ("SGD_TTT_EPOCHS", "5", "ttt_epochs", 5),
    ("SGD_TTT_PARAM_SET", "all", "ttt_params", "all"), ("QUANT_BITS", "6", "attn_bits", 6),
    ("TTT_CHUNK_SIZE", "65536", "ttt_chunk_tokens", 65536),
    ("TTT_COSINE_LR", "1", "ttt_schedule", "chunk"), ("TTT_COSINE_LR", "0", "ttt_schedule", "constant"),
    ("FULL_GPTQ", "0", "quantizer", "rtn"), ("FULL_GPTQ", "1", None, None),
    ("GPTQ_LITE", "1", "step_rule", "lite"), ("GPTQ_LITE", "0", None, None),
    ("INT5_MLP", "0", "mlp_bits", 6), ("INT5_MLP", "1", None, None),
    ("BIGRAM_HASH", "0", "bigram_vocab_size", 0), ("BIGRAM_HASH", "1", None, None),
    ("EMA_ENABLED", "0", "averaging", "none"), ("EMA_ENABLED", "1", None, None),
    ("SWA_ENABLED", "1", "averaging", "swa"), ("SWA_ENABLED", "0", None, None),
    ("SMEAR_GATE", "0", "smear_gate", "0"), ("SMEAR_GATE", "1", None, None),
    ("SMEAR_GATE", "vector", None, None), ("SMEAR_GATE", "token", "smear_gate", "token"),
    ("LATE_QAT", "0", None, None)]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "field", "value"), SPELT)
def test_other_spellings_set_the_field_and_no_other(name, text, field, value):
    changed = tg.changed(from_env({"LATE_QAT": "0", name: text}))
    assert changed.pop("late_qat_threshold") == 0.0 and changed == ({field: value} if field else {})


def test_every_spelling_is_tried_here():
    assert set(tg.SPELLINGS) <= {name for name, *_ in SPELT} and len(SWITCHES) == 9
    assert {len(setting.split()) for setting in tg.SPELLINGS.values()} == {1, 3, 5}
    said = {(name, text) for name, text, *_ in SPELT} | {("LATE_QAT", "1")}
    assert {(name, text) for name in SWITCHES for text in ("0", "1")} <= said
    assert from_env({"LATE_QAT": "1"}) == from_env({}) and tg.SPELLINGS.keys().isdisjoint(tg.FIXED)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("preset", tg.PRESETS)
def test_true_and_false_are_one_and_zero(name, preset):
    """And say nothing of any other setting: false once switched late QAT off, whatever was asked."""
    setting, seen = SWITCHES[name], set()
    for words in (("0", "false", "False", "FALSE"), ("1", "true", "True", "TRUE")):
        alike = [outcome({"PRESET": preset, name: word}) for word in words]
        alike = [each.replace(f"{name}={word}", name) if isinstance(each, str) else each
                 for each, word in zip(alike, words)]  # fmt: skip
        assert all(each == alike[0] for each in alike)
        if isinstance(alike[0], tg.Hyperparameters):
            assert set(tg.changed(alike[0])) <= {setting}
            seen.add(getattr(alike[0], setting))
        else:
            assert name == "GPTQ_LITE" and "LATE_QAT_THRESHOLD=0" in alike[0]
    assert seen


@pytest.mark.parametrize("yes", ["1", "true"])
def test_full_gptq_goes_before_gptq_lite(yes):
    """#601's full path never asks for GPTQ-lite; its second command sets both."""
    given = [from_env({"FULL_GPTQ": full, "GPTQ_LITE": lite, "LATE_QAT": "0"})
             for full, lite in ((yes, yes), ("0", yes), ("0", "0"))]  # fmt: skip
    assert [hp.quantizer for hp in given] == ["gptq", "rtn", "rtn"]
    assert [hp.step_rule for hp in given] == ["absmax", "lite", "absmax"]


@pytest.mark.parametrize("env", [
    {"XSA_LAYERS": "4", "XSA_LAST_N": "5"}, {"BIGRAM_BUCKETS": "512", "BIGRAM_VOCAB_SIZE": "1024"},
    {"PARTIAL_ROPE_DIMS": "16", "ROPE_DIMS": "8"}, {"WEIGHT_DECAY_MUON": "0.02", "MUON_WD": "0.04"},
    {"FULL_GPTQ": "1", "QUANTIZER": "rtn"}, {"INT5_MLP": "1", "MLP_BITS": "6"},
    {"TTT_COSINE_LR": "1", "TTT_SCHEDULE": "run"}, {"EMA_ENABLED": "0", "AVERAGING": "ema"},
    {"SWA_ENABLED": "1", "AVERAGING": "ema"}, {"EMA_ENABLED": "1", "SWA_ENABLED": "1"},
    {"LATE_QAT": "0", "LATE_QAT_THRESHOLD": "0.5"}])  # fmt: skip
def test_two_names_that_say_different_things(env):
    assert len(complaint := lines(env)) == 1 and all(name in complaint[0] for name in env)


@pytest.mark.parametrize("env", [
    {"XSA_LAYERS": "4", "XSA_LAST_N": "4"}, {"MUON_WD": "0.020", "WEIGHT_DECAY_MUON": "0.02"},
    {"EMA_ENABLED": "1", "SWA_ENABLED": "0", "AVERAGING": "ema"}, {"EMA_ENABLED": "0", "AVERAGING": "none"},
    {"SWA_ENABLED": "1", "AVERAGING": "swa"}, {"LATE_QAT": "1", "LATE_QAT_THRESHOLD": "0.3"}])  # fmt: skip
def test_two_names_that_say_the_same(env):
    name, text = list(env.items())[-1]
    setting = tg.SPELLINGS.get(name, name.lower()).split()[0]
    assert str(getattr(from_env(env), setting)) == text


# One value may be said, another is an error: techniques of the submissions that are not carried, constants,
# and the settings of run.sh, which runs the script once for each of SEEDS.
FIXED = dict.fromkeys("""USE_MIXER USE_CACHE BYTE_WEIGHTED_TTT ADAPTIVE_LR QTTT DTG_ENABLED HYPER_CONNECTIONS
    ADAPTIVE_VR TTT_GA_GUIDED CACHE_MIXTURE OGD_BIAS KV_CACHE_LEN VR_V0_FP16 GPTQ_LITE_SEARCH INT6_LAST_N
    QAT_ENABLED USE_POLYAK TTT_PERLAYER_LR""".split(), ("0", "1")) | {
    "PPM_ALPHA": ("1.0", "0.85"), "TIE_EMBEDDINGS": ("1", "0"), "TTT_LEGAL": ("1", "0"),
    "BETA1": ("0.90", "0.8"), "ADAM_EPS": ("1e-08", "1e-6"), "MUON_BACKEND_STEPS": ("5", "6"),
    "TIED_EMBED_INIT_STD": ("5e-3", "0.02"), "SGD_TTT_SEQ_LEN": ("1024", "2048"),
    "LOAD_ARTIFACT": ("", "model.ptz"), "SEEDS": ("", "1,2"), "NPROC": ("", "8")}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_what_is_not_carried_may_be_off(name):
    fine, other = FIXED[name]
    assert from_env({name: fine}) == from_env({name: ""}) == from_env({}) and set(FIXED) == set(tg.FIXED)
    assert len(complaint := lines({name: other})) == 1 and f"{name}={other}" in complaint[0]
    if fine in ("0", "1"):
        assert from_env({name: str(fine == "1").lower()}) == from_env({})
        assert len(lines({name: str(fine == "0")})) == 1


def test_names_without_effect_are_accepted():
    assert from_env(dict.fromkeys(tg.IGNORED_NAMES, "anything")) == from_env({})
    assert tg.doubtful_names(tg.IGNORED_NAMES, FIELDS) == ([], [])


# ----------------------------------------------------------------------------------------------------------
# Misspelt names
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "meant"), [
    ("NUM_LAYRES", "NUM_LAYERS"), ("MATRX_LR", "MATRIX_LR"), ("VOCAB_SIZES", "VOCAB_SIZE"),
    ("BIGRAM_BUCKET", "BIGRAM_BUCKETS"), ("MATRIX_LT", "MATRIX_LR"), ("EMBED_LRR", "EMBED_LR"),
    ("USE_MIXERS", "USE_MIXER"), ("MODEL_DIMM", "MODEL_DIM"), ("TTT_EPOCH", "TTT_EPOCHS"),
    ("TTT_L", "TTT_LR"), ("EMA_DECAI", "EMA_DECAY")])  # fmt: skip
def test_a_long_name_or_one_of_ours_that_is_near_a_setting_is_an_error(name, meant):
    assert lines({name: "1"}) == [f"{name} is not a setting; did you mean {meant}?"]


@pytest.mark.parametrize(("name", "meant"), [
    ("SEEED", "SEED"), ("ITERATION", "ITERATIONS"), ("NUMLAYERS", "NUM_LAYERS"),
    ("DATAPATH", "DATA_PATH"), ("PRSET", "PRESET"), ("NPROCS", "NPROC"), ("VE_DI", "VE_DIM")])  # fmt: skip
def test_a_short_or_single_word_is_a_caution_and_stops_no_run(name, meant):
    assert from_env({name: "1"}) == from_env({})
    errors, cautions = tg.doubtful_names({"SEED": "1", name: "1"}, FIELDS)
    assert errors == [] and cautions == [f"{name} is not a setting; did you mean {meant}?"]


def some_place(name):
    """A place in the word that depends on the word alone, never the first letter or the underscore's."""
    places = [at for at in range(1, len(name)) if name[at] != "_"]
    return places[sum(map(ord, name)) % len(places)]


def test_every_setting_with_a_letter_left_out_is_one_or_the_other():
    known = {name.upper() for name in FIELDS} | tg.SPELLINGS.keys() | tg.FIXED.keys() | set(tg.IGNORED_NAMES)
    misspelt = {name[:at] + name[at + 1 :] for name in sorted(known) for at in [some_place(name)]} - known
    errors, cautions = tg.doubtful_names(misspelt, FIELDS)
    sure = {name for name in misspelt if name.startswith(tg.OWN_PREFIXES) or len(name) > 5 and "_" in name}
    assert {line.split()[0] for line in errors} == sure and len(errors) == len(sure) > 0
    assert {line.split()[0] for line in cautions} == misspelt - sure and misspelt - sure
    assert all(line.split()[-1].rstrip("?") in known for line in errors + cautions)


@pytest.mark.parametrize("prefix", tg.OWN_PREFIXES)
def test_an_own_prefix_alone_is_no_error(prefix):
    """TTT_PORT may be anything; what is near nothing is not ours."""
    assert tg.doubtful_names([prefix + "COMPLETELY_UNHEARD_OF"], FIELDS) == ([], [])


def test_ordinary_variables_are_silent():
    assert from_env(dict.fromkeys(ORDINARY, "whatever")) == from_env({})
    assert tg.doubtful_names(ORDINARY, FIELDS) == ([], [])


def test_words_of_shells_and_clusters_stop_no_run():
    names = ("SERVICE", "STAGE", "SPEED", "TYPE", "COMPILER", "TTT_PORT", "RESET")
    assert from_env(dict.fromkeys(names, "whatever")) == from_env({})
    named = {line.split()[0] for line in tg.doubtful_names(names, FIELDS)[1]}
    assert named <= {*names} - {"TTT_PORT"} and "STAGE" in named


def test_names_of_the_other_programs_and_far_ones_are_silent():
    names = ["TORCH_INDEX_URL", "HF_ENDPOINT", "MATCHED_FINEWEB_REPO_ID", "ITERXXXIONS",
             "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "MY_OWN_THING", "seed", "X" * 2000]  # fmt: skip
    assert from_env(dict.fromkeys(names, "1")) == from_env({})
    assert tg.doubtful_names(names, FIELDS) == ([], [])


# ----------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------


def test_every_error_at_once():
    said = """NUM_LAYRES=3 SEED=abc USE_MIXER=1 XSA_LAYERS=1 XSA_LAST_N=2 MATRIX_LR=-1 AVERAGING=median
        TTT_EPOCH=1 NUM_HEADS=0 SEEDS=1"""
    complaint = lines(environment(said))
    for word in ("NUM_LAYRES", "SEED=abc", "USE_MIXER=1", "XSA_LAYERS", "MATRIX_LR", "AVERAGING=median is",
                 "TTT_EPOCH ", "NUM_HEADS=0", "SEEDS=1"):  # fmt: skip
        assert sum(word in line for line in complaint) == 1, (word, complaint)
    assert len(complaint) == 9
    assert len(lines({"MODEL_DIM": "500", "NUM_KV_HEADS": "3", "STAGES": "train,dream"})) == 3


def test_main_says_what_is_wrong_and_ends(tmp_path, capsys):
    assert run_here(tmp_path, {"SEEDS": "1,2", "NUM_LAYRES": "3"}) == 1
    out, err = capsys.readouterr()
    assert out == "" and "NUM_LAYRES" in err and "SEEDS=1,2" in err and len(err.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if isinstance(f.default, (int, float))])
def test_numbers_at_their_bounds_and_just_beyond(name):
    """A closed end is taken, an open one and what lies beyond are refused by name; no combination crashes."""
    like, within = FIELDS[name].default, FIELDS[name].metadata["within"]
    if isinstance(like, bool):
        known = {"TTT_ENABLED": "0", "ROPE_NTK_REFERENCE": "0"} if name == "document_mask" else {}
        assert [getattr(from_env(known | {name.upper(): text}), name) for text in ("0", "1")] == [False, True]
        return

    def refused(value):
        told = outcome({name.upper(): str(type(like)(value))})
        return isinstance(told, str) and f"{name.upper()}={type(like)(value)} must lie in {within}" in told

    for text, outwards, bracket in zip(within[1:-1].split(","), (-1, 1), (within[0], within[-1])):
        end = float(text)
        outwards *= 1 if isinstance(like, int) else max(end, 1.0) * 1e-9
        assert refused(end) == (bracket in "()")
        assert refused(end + outwards) and not refused(end - outwards)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-0.5"])
def test_numbers_that_are_none(text):
    """One line, about this setting alone."""
    assert len(complaint := lines({"TTT_LR": text})) == 1 and complaint[0].startswith("TTT_LR=")


CHOICES = [
    f"{name.upper()}={text}" for name, f in FIELDS.items() if f.metadata["choices"] for text in ("x", "PR606")
]


@pytest.mark.parametrize("said", """
    ITERATIONS=1e3 ITERATIONS=12.5 ITERATIONS=ten MATRIX_LR=0,1 LN_SCALE=yes LN_SCALE=2 VE_LAYERS=9,x
    VE_LAYERS=9.5 SKIP_SLIDING=on EMA_ENABLED=2 FULL_GPTQ=maybe TTT_COSINE_LR=cos BIGRAM_BUCKETS=many
""".split() + CHOICES)  # fmt: skip
def test_text_of_the_wrong_kind(said):
    assert any(line.startswith(said) for line in lines(environment(said)))


def test_kinds_of_values():
    env = {"LN_SCALE": "false", "MUON_ROW_NORM": "True", "VE_LAYERS": "3, 4", "MLP_MULT": "2", "SEED": "5"}
    hp, expected = from_env(env), (False, True, (3, 4), 2.0, 5)
    assert tuple(getattr(hp, name.lower()) for name in env) == expected
    assert all(type(getattr(hp, name)) is type(f.default) for name, f in FIELDS.items())


def test_an_empty_value_is_no_value():
    assert from_env(dict.fromkeys([*tg.SPELLINGS, *tg.FIXED, *map(str.upper, FIELDS)], "")) == from_env({})


@pytest.mark.parametrize("said", """
    MODEL_DIM=500 NUM_KV_HEADS=3 ROPE_DIMS=15 ROPE_DIMS=66 ROPE_DIMS=2 BIGRAM_VOCAB_SIZE=1 VE_LAYERS=11
    VE_LAYERS=, VE_LAYERS=-1 VE_LAYERS=9,9 NUM_LAYERS=9 TRAIN_BATCH_TOKENS=3000 EVAL_STRIDE=2049
    TTT_CHUNK_TOKENS=3000 TTT_FREEZE_BLOCKS=12 STAGES=train,,evaluate STAGES=score ARTIFACT=a.bin
    TARGET_BITS=-1 TARGET_BITS=10 STEP_RULE=clip STEP_RULE=lite
    RUN_ID=../elsewhere RUN_ID=/tmp/elsewhere RUN_ID=a/../../b RUN_ID=..
    VOCAB_SIZE=65537 SEED=4294967296 SEED=-1 BETA2=1 MUON_MOMENTUM=1 EMA_DECAY=1 LOGIT_SOFTCAP=0 ATTN_BITS=1
    MLP_BITS=9 EMBED_BITS=16 PRUNE_PCT=1 EVAL_STRIDE=0 ITERATIONS=0 TTT_EPOCHS=0 ARTIFACT_LIMIT=0 NUM_HEADS=0
""".split())  # fmt: skip
def test_values_that_no_run_can_use(said):
    assert len(complaint := lines(environment(said))) == 1 and said.split("=")[0] in complaint[0]


def test_steps_by_rate_need_the_widest_codes():
    assert all("8" in line for line in lines({"STEP_RULE": "water", "LATE_QAT_THRESHOLD": "0"}))
    assert lines({"STEP_RULE": "water", "LATE_QAT_THRESHOLD": "0", "ATTN_BITS": "8"})


@pytest.mark.parametrize("env", [
    {"EVAL_STRIDE": "2048"}, {"TTT_FREEZE_BLOCKS": "11"}, {"TTT_FREEZE_BLOCKS": "12", "TTT_PARAMS": "all"},
    {"ROPE_DIMS": "64"}, {"BIGRAM_VOCAB_SIZE": "2"}, {"VE_ENABLED": "0", "NUM_LAYERS": "4"},
    {"VE_ENABLED": "0", "VE_LAYERS": ","}, {"VE_LAYERS": "0"}, {"STAGES": "quantize,evaluate"},
    {"STAGES": "evaluate", "ARTIFACT": "a.bin"}, {"TTT_ENABLED": "0", "SKIP_SLIDING": "0"},
    {"STEP_RULE": "lite", "LATE_QAT_THRESHOLD": "0"}, {"STEP_RULE": "clip", "STAGES": "quantize"},
    {"STEP_RULE": "water", "ATTN_BITS": "8", "MLP_BITS": "8", "LATE_QAT_THRESHOLD": "0"},
    {"RUN_ID": "my-run_1.2"}])  # fmt: skip
def test_combinations_at_the_edge(env):
    assert set(tg.changed(from_env(env))) == {name.lower() for name in env}


def test_an_unknown_preset_names_the_known_ones():
    complaint = "\n".join(lines({"PRESET": "pr607"}))
    assert all(name in complaint for name in ("PRESET=pr607", *tg.PRESETS))


# ----------------------------------------------------------------------------------------------------------
# What is said about settings
# ----------------------------------------------------------------------------------------------------------


def test_changed_lists_what_differs_from_the_preset():
    usual = from_env({"PRESET": "smoke"})
    env = {"PRESET": "smoke", "SEED": "3", "VE_LAYERS": "1", "LATE_QAT": "0", "XSA_LAYERS": "2",
           "ITERATIONS": str(usual.iterations)}  # fmt: skip
    changed = {"seed": 3, "ve_layers": (1,), "late_qat_threshold": 0.0, "xsa_last_n": 2}
    assert tg.changed(from_env(env)) == changed
    assert tg.changed(usual) == {}


def test_every_setting_is_a_row_of_the_table():
    """And the table's own cells, given back as settings, are the preset."""
    text = tg.settings_table()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0][0] == "name" and rows[0][-1] == "meaning" and set(rows[0][1:-1]) == set(tg.PRESETS)
    assert set("".join(rows[1])) == {"-"} and len({len(line) for line in text.splitlines()}) == 1
    table = {row[0]: row for row in rows[2:]}
    assert list(table) == [row[0] for row in rows[2:]] == [name.upper() for name in FIELDS]
    for column, preset in enumerate(rows[0][1:-1], 1):
        cells = {name: row[column] for name, row in table.items()}
        hp = from_env({name: cell for name, cell in cells.items() if cell != '""'})
        assert hp.preset == preset and tg.changed(hp) == {}
        assert all(getattr(hp, name.lower()) == "" for name, cell in cells.items() if cell == '""')
    for name, f in FIELDS.items():
        assert table[name.upper()][-1].startswith(f.metadata["meaning"])
        assert all(choice in table[name.upper()][-1] for choice in f.metadata["choices"])


# ----------------------------------------------------------------------------------------------------------
# What a user may type
# ----------------------------------------------------------------------------------------------------------

NO_NUMBERS = ["1_000", "\u0661\u0662", "\uff11\uff12", " 12", "12 ", "12\n", "1 2", "0x10", "1e400",
              "9" * 400, "12abc", "--1", "1.2.3", "nan", "1e", "²"]  # fmt: skip


@pytest.mark.parametrize("name", ["ITERATIONS", "MATRIX_LR", "VOCAB_SIZE", "SEED", "VE_LAYERS"])
@pytest.mark.parametrize("text", NO_NUMBERS, ids=ascii)
def test_what_is_no_plain_number_is_refused_in_one_short_line(name, text):
    assert len(complaint := lines({name: text})) == 1
    assert complaint[0].startswith(f"{name}=") or name in complaint[0]
    assert len(complaint[0]) < 160


@pytest.mark.parametrize("said", """
    MODEL_DIM=2147483648 NUM_LAYERS=100000000000000000000 MLP_MULT=1e308 MLP_SLOPE=1e308 LOGIT_SOFTCAP=1e308
    LOGIT_SOFTCAP=1e-320 MATRIX_LR=1e308 BIGRAM_DIM=1000000000 TRAIN_SEQ_LEN=99999999999
""".split())  # fmt: skip
def test_no_value_is_beyond_what_its_field_allows(said):
    (complaint,) = lines(environment(said))
    assert complaint.startswith(said.split("=")[0]) and "must lie in [" in complaint


@pytest.mark.parametrize(
    "name", ["a b", "a\n", "\n", " a", "..", ".", "-a", "a/b", "ä", "\udcff", "a" * 201, "\u0661"], ids=ascii
)
def test_a_run_id_is_a_plain_name(name):
    (complaint,) = lines({"RUN_ID": name})
    assert complaint.startswith("RUN_ID must name a folder")
    assert from_env({"RUN_ID": "lr=0.02,wd=1e-3_seed.7+x@y"}).run_id


@pytest.mark.parametrize("said", """
    SWA_ENABLED=false INT5_MLP=false FULL_GPTQ=false BIGRAM_HASH=false TTT_COSINE_LR=false EMA_ENABLED=false
    GPTQ_LITE=false SWA_ENABLED=0 INT5_MLP=0 FULL_GPTQ=0 BIGRAM_HASH=0 TTT_COSINE_LR=0
""".split())  # fmt: skip
@pytest.mark.parametrize("preset", tg.PRESETS)
def test_a_switch_of_one_technique_leaves_late_qat_alone(preset, said):
    usual, hp = from_env({"PRESET": preset}), from_env({"PRESET": preset} | environment(said))
    assert hp.late_qat_threshold == usual.late_qat_threshold and hp.soft_round_qat == usual.soft_round_qat
    assert hp.late_qat_threshold > 0 or preset.startswith("pr1855")
    other = from_env({"PRESET": preset, "LATE_QAT": "false"})
    assert other.late_qat_threshold == 0


def test_seeds_and_nproc_are_not_the_scripts(tmp_path, capsys):
    for name in ("SEEDS", "NPROC"):
        assert run_here(tmp_path, {name: "1"}) == 1
        assert f"{name}=1 is no value" in capsys.readouterr().err
