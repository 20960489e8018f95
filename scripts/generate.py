"""Continues a text with a trained model.

  python scripts/generate.py --checkpoint runs/prosparse_7b --prompt "Sparse neurons are"
  python scripts/generate.py --checkpoint exports/prosparse-7b --prompt "Once" --temperature 0.8 --top-p 0.95

By default the most likely token is taken each time; with a temperature, tokens are drawn. The text appears as it is
made; after it one line says how fast that was and how sparse the activations were. A ReLU or FATReLU model skips what
its inactive neurons would compute.
"""

import argparse
import sys
from pathlib import Path

from prosparse_jax.errors import run_script


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run, a checkpoint, or a Hugging Face directory"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        help="the text to continue; give it several times to continue several at once, each printed when it is done",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest continuation (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: most likely; 1: as trained (default 0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw only among the likeliest tokens of this probability (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another one draws other tokens (default 0)")
    parser.add_argument(
        "--ffn",
        choices=("auto", "sparse", "dense"),
        default="auto",
        help="sparse: skip inactive neurons; dense: compute all; auto: whichever should be faster (default)",
    )
    return parser


def main() -> None:
    arguments = _parser().parse_args()

    from prosparse_jax.data.tokenizer import tokenizer_from_files
    from prosparse_jax.inference.engine import Engine, check_request
    from prosparse_jax.inference.sampling import Sampling
    from prosparse_jax.inference.text import encode_prompts, stop_tokens, summary, write_texts
    from prosparse_jax.interop.sources import open_source
    from prosparse_jax.runtime import prepare_runtime

    prepare_runtime()
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)
    source = open_source(arguments.checkpoint)
    tokenizer = tokenizer_from_files(source.assets, str(source.location))
    prompts = encode_prompts(tokenizer, arguments.prompt)
    stop = stop_tokens(source, tokenizer)
    # Said before the weights are read, which takes a while, not after it.
    check_request(source.model, prompts, arguments.max_new_tokens)
    generation = Engine(source, ffn=arguments.ffn).generate(
        prompts, max_new_tokens=arguments.max_new_tokens, sampling=sampling, stop=stop
    )

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    write_texts(generation, tokenizer, arguments.prompt, write)
    print(summary(generation))


if __name__ == "__main__":
    run_script(main)
