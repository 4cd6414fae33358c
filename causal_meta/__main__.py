"`python -m causal_meta`: the same as the command `causal-meta`."
from causal_meta.cli import main

main()
