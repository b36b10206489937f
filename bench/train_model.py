"""Train the small language model in ``tests/model`` that the tests and the demo run on.

Owns its tokenizer and its training loop; `training_text.py` owns the text.
One process, one thread of its own. It is here so that nobody has to trust a file of weights: whoever doubts the model
makes it again, in minutes on one GPU:

    python bench/train_model.py fetch-text          # apt-get download, unpack, keep the prose: text.xz
    python bench/train_model.py tokenize            # byte-level BPE, tokens: tokenizer.json, tokens.xz
    python bench/train_model.py train --minutes 6   # writes a Hugging Face folder that vLLM loads
    python bench/train_model.py sample "To install the package,"
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm
from training_text import DOCUMENT_END, PACKAGES, fetch_text
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

LossFunction = Callable[[Tensor], Tensor]

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
# 3.4 M parameters: with the tokenizer 7.1 MB, small enough for a repository. Changing it changes what tests expect.
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
# No roles: a model of this size knows text, not conversations, so a chat is the text of its messages, to be continued.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
BAR_FORMAT = "{percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"


def new_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE (digits one by one) that puts ``<|bos|>`` before every text."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=[BOS, EOS], initial_alphabet=byte_level.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def tokenize(args: argparse.Namespace) -> None:
    """Write ``tokenizer.json`` and ``tokens.xz`` (uint16; each document between BOS and EOS, in a shuffled order)."""
    with lzma.open(args.work / "text.xz", "rt", encoding="utf-8") as file:
        documents = file.read().split(DOCUMENT_END)[:-1]
    np.random.default_rng(args.seed).shuffle(documents)
    tokenizer = new_tokenizer(documents)
    tokenizer.save(str(args.work / "tokenizer.json"))
    with lzma.open(args.work / "tokens.xz", "wb", preset=3) as out:
        num_tokens = 0
        for start in tqdm(range(0, len(documents), 256), unit="batch"):
            for encoding in tokenizer.encode_batch(documents[start : start + 256]):
                ids = np.array([*encoding.ids, EOS_ID], dtype=np.uint16)
                out.write(ids.tobytes())
                num_tokens += len(ids)
    print(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} MB, {num_tokens / 1e6:.1f} M tokens")


# ----------------------------------------------------------------------------------------------- model


def new_model() -> LlamaForCausalLM:
    """Build the model with random weights; what writes into the residual stream starts smaller, as in GPT-2."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=BOS_ID, eos_token_id=EOS_ID))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.div_(math.sqrt(2 * SHAPE["num_hidden_layers"]))
    return model


def token_loss(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss in nats of target ids [batch, tokens], given the last hidden states."""
    return cross_entropy(linear(hidden, embedding).flatten(0, 1).float(), targets.flatten())


def loss_function(model: LlamaForCausalLM, is_compiled: bool) -> LossFunction:
    """Return the loss of token ids [batch, tokens + 1].

    Layers are compiled one by one: compiled as a whole, transformers builds a dense mask, and flash attention is lost.
    """
    head_loss = torch.compile(token_loss) if is_compiled else token_loss
    for layer in model.model.layers if is_compiled else ():
        layer.compile()

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16):
            hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
            return head_loss(hidden, model.lm_head.weight, ids[:, 1:])

    return loss


def save_model(model: LlamaForCausalLM, tokenizer_json: str, folder: Path) -> None:
    """Write the Hugging Face folder, weights in bf16."""
    # Sampling defaults that suit a model this small; a request's own parameters go before them.
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, do_sample=True, temperature=0.7, top_p=0.9
    )
    model.bfloat16().save_pretrained(folder)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    tokenizer_config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": SHAPE["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


# -------------------------------------------------------------------------------------------- training


class Windows:
    """Training windows out of the token stream: half begin at a document, half anywhere; the last 1% is held out."""

    def __init__(self, tokens: Tensor, seq_len: int, seed: int) -> None:
        num_held_out = max(len(tokens) // 100, seq_len + 1)
        self._train, self._held_out = tokens[:-num_held_out], tokens[-num_held_out:]
        starts = (self._train == BOS_ID).nonzero().flatten()
        self._starts = starts[starts < len(self._train) - seq_len]
        self._offsets = torch.arange(seq_len + 1, device=tokens.device)
        self._generator = torch.Generator(tokens.device).manual_seed(seed)

    def _draw(self, end: int, count: int) -> Tensor:
        return torch.randint(end, (count,), generator=self._generator, device=self._offsets.device)

    def batch(self, size: int) -> Tensor:
        """Return [size, seq_len + 1] token ids."""
        anywhere = self._draw(len(self._train) - len(self._offsets), size - size // 2)
        at_documents = self._starts[self._draw(len(self._starts), size // 2)]
        return self._train[torch.cat((anywhere, at_documents))[:, None] + self._offsets].long()

    def held_out(self, size: int) -> Sequence[Tensor]:
        """Return up to four batches of the held-out text, in its order."""
        all_windows = self._held_out.unfold(0, len(self._offsets), len(self._offsets))
        return list(all_windows[: 4 * size].long().split(size))


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Rise over 200 steps, then follow a cosine down to 1% of the peak; ``progress`` runs from 0 to 1."""
    return peak * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def new_optimizer(model: nn.Module, device: str) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device == "cuda")


def take_step(loss_of: LossFunction, ids: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> Tensor:
    """Do one optimizer step and return the loss, still on its device."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(ids)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def train(args: argparse.Namespace) -> None:
    """Train until the minutes or the steps are over and write the model folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    with lzma.open(args.work / "tokens.xz") as file:
        tokens = torch.from_numpy(np.frombuffer(file.read(), np.uint16).astype(np.int32)).to(device)
    windows = Windows(tokens, args.seq_len, args.seed)
    model = new_model().to(device)
    loss_of = loss_function(model, args.compile)
    optimizer = new_optimizer(model, device)
    print(f"{device}: {model.num_parameters()} parameters, {len(tokens) / 1e6:.1f} M tokens of text")
    started, step, progress = time.monotonic(), 0, 0.0
    with tqdm(total=100, unit="%", mininterval=args.log_interval_s, bar_format=BAR_FORMAT) as bar:
        while progress < 1:
            rate = learning_rate(progress, step, args.learning_rate)
            loss = take_step(loss_of, windows.batch(args.batch), optimizer, rate)
            step += 1
            if step % 20 == 0 or step < 5:  # The only place that waits for the GPU.
                bar.set_postfix_str(f"step {step}, loss {float(loss):.3f}", refresh=False)
            progress = min(1.0, max(step / args.steps, (time.monotonic() - started) / 60 / args.minutes))
            bar.update(100 * progress - bar.n)
    elapsed_s = time.monotonic() - started
    num_tokens = step * args.batch * args.seq_len
    print(f"{step} steps, {num_tokens / 1e6:.1f} M tokens in {elapsed_s:.0f} s ({num_tokens / elapsed_s:.0f} a second)")
    # Shapes and gradient mode stay as in training: anything else would compile again.
    held_out = torch.stack([loss_of(ids).detach() for ids in windows.held_out(args.batch)]).mean()
    print(f"last training loss {float(loss):.3f}, held-out loss {float(held_out):.3f} nats a token")
    save_model(model, (args.work / "tokenizer.json").read_text(), args.model)


def sample(args: argparse.Namespace) -> None:
    """Print a continuation of each prompt."""
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    choice = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    for prompt in args.prompts:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, **choice)
        print(f"[{prompt}]{tokenizer.decode(out[0, ids.shape[1] :].tolist())}\n")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(".train"), help="folder of text and tokens (%(default)s)")
    parser.add_argument("--model", type=Path, default=Path("tests/model"), help="model folder (%(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any) -> argparse.ArgumentParser:
        shown = argparse.ArgumentDefaultsHelpFormatter
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__, formatter_class=shown)
        added.set_defaults(run=function)
        return added

    fetch = command("fetch-text", fetch_text)
    fetch.add_argument("--packages", nargs="+", default=PACKAGES.split(), metavar="NAME", help="Debian packages")
    fetch.add_argument("--max-package-mb", type=int, default=6, help="most prose taken from one package, in MB")
    command("tokenize", tokenize)
    trained = command("train", train)
    trained.add_argument("--minutes", type=float, default=6.0, help="stop after so many minutes")
    trained.add_argument("--steps", type=int, default=10**9, help="or after so many steps")
    trained.add_argument("--batch", type=int, default=16, help="sequences a step")
    trained.add_argument("--seq-len", type=int, default=4096, help="tokens a sequence; on a CPU try 256")
    trained.add_argument("--learning-rate", type=float, default=4e-3, help="peak of the schedule")
    trained.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    trained.add_argument("--log-interval-s", type=float, default=1.0, help="between lines of the progress bar")
    sampled = command("sample", sample)
    sampled.add_argument("prompts", nargs="+")
    sampled.add_argument("--tokens", type=int, default=100)
    sampled.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
