# Sourced by the commands beside it: go to the root of the checkout, make the environment, and use it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
unset PYTHONHOME
# A notebook chooses its own backend: with `agg` exported, figures vanish from the executed copies.
unset MPLBACKEND
# Real data in a folder beside the checkout is used as it is; nothing is downloaded then.
if [ -z "${CAUSAL_META_DATA:-}" ] && [ -d ../shared/data ]; then
  CAUSAL_META_DATA="$(cd ../shared/data && pwd)"
  export CAUSAL_META_DATA
fi
