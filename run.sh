#!/usr/bin/env bash
# One command from nothing to a scored artifact: environment, data, run, summary, report.
#
#   ./run.sh                     the smoke preset: a small model on an embedded corpus, a few minutes on two CPU cores
#   ./run.sh pr606               FineWeb, 11 layers; one process per CUDA device (NPROC=n to choose)
#   ./run.sh pr601
#   ./run.sh pr1855              FineWeb in 8,192 pieces
#   ./run.sh pr1855_smoke        the same small, on the embedded corpus
#   SEEDS=1337,42,7 ./run.sh     a run for each seed, one after the other, then their mean and deviation
#   ./run.sh gpucheck            on one GPU, ten minutes: its tests, then a step's parts beside their estimates
#   ./run.sh test                the test suite, and its ten slowest tests
#   ./run.sh test quick          the tests that start no process, in about a minute
#
# Settings are environment variables (python train_gpt.py --help). Of its own: SEEDS, NPROC, TORCH_INDEX_URL (where pip
# finds torch, e.g. a CPU-only build), TRAIN_SHARDS (FineWeb shards to download, 80), PYTHON (the interpreter to use).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "error: $*" >&2; exit 1; }
say() { echo "run.sh: $*"; }

what=${1:-${PRESET:-smoke}}
case $what in  # where a preset's text comes from, and the size of its vocabulary
  smoke|pr1855_smoke) corpus=sotu vocab=4096 ;;
  pr606|pr601) corpus=fineweb vocab=1024 ;;
  pr1855) corpus=fineweb vocab=8192 ;;
  gpucheck|test) corpus= ;;
  *) fail "unknown argument '$what'; use smoke, pr606, pr601, pr1855, pr1855_smoke, gpucheck or test" ;;
esac
[ $# -le 1 ] || [ "$*" = "test quick" ] || fail "one argument, or 'test quick'; settings are environment variables"
seeds=${SEEDS:-} nproc=${NPROC:-}
unset SEEDS NPROC  # this script's own: train_gpt.py refuses them

# 1. A Python that has what this run imports: the current one, else .venv.
modules="numpy sentencepiece zstandard"
case $what in
  gpucheck) modules="$modules pytest" ;;
  test) modules="$modules pytest ruff huggingface_hub tqdm matplotlib scipy" ;;
esac
[ "$corpus" != fineweb ] || modules="$modules huggingface_hub tqdm"
has_modules() {
  "$1" - $modules <<'PY' >/dev/null 2>&1
import importlib.util, sys
from importlib.metadata import version
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
release = tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
sys.exit(bool(missing) or release < (2, 13))
PY
}
base=${PYTHON:-python3}
command -v "$base" >/dev/null || fail "$base not found; install Python 3.11 or newer, or set PYTHON"
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$base" --version) is too old; Python 3.11 or newer is needed"
if has_modules "$base"; then
  python=$base
else
  python=.venv/bin/python
  if ! [ -x "$python" ] || ! has_modules "$python"; then
    say "making .venv and installing requirements.txt (once)"
    "$base" -m venv .venv || fail "cannot make .venv; on Debian and Ubuntu: apt-get install python3-venv"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
      "$python" -m pip install --quiet --disable-pip-version-check --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' requirements.txt)"
    fi
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
      fail "pip could not install requirements.txt; check the network and run again"
  fi
fi

# Threads that spin while they wait make a step fifty times slower where another process wants the cores.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}

if [ "$what" = test ]; then
  marks="not slow"
  [ "${2:-}" != quick ] || marks="$marks and not whole"
  "$python" -m ruff check .
  "$python" -m ruff format --check tests
  exec "$python" -m pytest -q -m "$marks" --durations=10 tests
fi

if [ "$what" = gpucheck ]; then
  "$python" -m pytest -q -m gpu tests/test_cuda.py || fail "a test of the GPU fails: rent no more before it passes"
  exec "$python" records/gpucheck.py
fi

# 2. Data, where the run uses the preset's own; a second call finds it there.
export PRESET=$what
if [ -z "${DATA_PATH:-}" ]; then
  case $corpus in
    sotu) "$python" data/prepare.py sotu --vocab-size "${VOCAB_SIZE:-$vocab}" ;;
    *)
      shards=${TRAIN_SHARDS:-80}
      case $shards in *[!0-9]*) fail "TRAIN_SHARDS=$shards is not a number" ;; esac
      say "FineWeb, $shards training shards: about $(((shards * 2 + 1) / 10)) GB to download, less what is here already"
      "$python" data/prepare.py fineweb --variant "sp${VOCAB_SIZE:-$vocab}" --train-shards "$shards" ;;
  esac
fi

# 3. A run for each seed, each with its summary and its report; a small one also with what each technique is worth in it
#    and a few words from the packed model.
nproc=${nproc:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
given=${RUN_ID:-}
folders=()

one_run() {
  if [ "$nproc" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" train_gpt.py
  else
    "$python" train_gpt.py
  fi
  "$python" records/summary.py "$1"
  if [ "$corpus" = sotu ] && [ -f "$1/artifact.bin" ]; then
    echo
    "$python" records/audit.py "$1/artifact.bin" --techniques || say "no such table, but the run in $1 is whole"
  fi
  if "$python" -c 'import matplotlib' 2>/dev/null; then
    "$python" records/report.py "$1" || say "no report, but the run in $1 is whole"
  else
    say "no report: $python -m pip install matplotlib, then $python records/report.py $1"
  fi
  if [ "$corpus" = sotu ] && [ -f "$1/artifact.bin" ]; then
    say "the packed model, left to itself (records/sample.py):"
    "$python" records/sample.py "$1" --tokens 80 || say "no sample, but the run in $1 is whole"
  fi
}

for seed in $(echo "${seeds:-${SEED:-1337}}" | tr ',' ' '); do
  export SEED=$seed RUN_ID=$what-seed$seed-$(date +%Y%m%d-%H%M%S)
  [ -z "$given" ] || RUN_ID=$given${seeds:+-seed$seed}
  one_run "logs/$RUN_ID"
  folders+=("logs/$RUN_ID")
done
[ "${#folders[@]}" -gt 0 ] || fail "SEEDS=$seeds names no seed; write SEEDS=1337,42,7"
[ -z "$seeds" ] || "$python" records/compare.py "${folders[@]}"
