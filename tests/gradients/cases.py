"""Models and batches that every engine is tried on, in float64, with a dense oracle."""

import contextlib
import functools

import torch
from torch import nn


class Tiny(nn.Module):
    """Embedding, norms, a linear layer used twice, a bare scale, and a tied head."""

    def __init__(self, vocabulary=17, width=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.rms = nn.RMSNorm(width)
        self.twice = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + torch.tanh(self.twice(self.norm(x)))
        x = x + torch.tanh(self.twice(self.rms(x)))
        return self.head(x)


def token_loss(model, batch):
    logits = model(batch["ids"])
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    counted = batch["labels"] != -100
    return (losses * counted).sum(1) / counted.sum(1)


def tiny():
    torch.manual_seed(0)
    model = Tiny().double()
    ids = torch.randint(1, 17, (5, 6))
    labels = torch.randint(0, 17, (5, 6))
    labels[0, :4] = -100
    ids[3, 4:], labels[3, 4:] = 0, -100
    return model, {"ids": ids, "labels": labels}, token_loss


def mlp():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    batch = (torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))
    return model, batch, lambda m, b: ((m(b[0]) - b[1]) ** 2).sum(1)


def mlp_mean_loss():
    model, batch, _ = mlp()
    return model, batch, lambda m, b: ((m(b[0]) - b[1]) ** 2).mean()


def _lm(config_class, model_class, **settings):
    torch.manual_seed(2)
    model = model_class(config_class(**settings)).double().eval()
    ids = torch.randint(1, 23, (4, 7))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :2] = -100
    ids[1, 5:], mask[1, 5:], labels[1, 5:] = 0, 0, -100
    positions = torch.arange(7).expand(4, 7).contiguous()
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    from arisk.models.losses import per_sample_nll

    return model, batch, per_sample_nll


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return _lm(
        LlamaConfig,
        LlamaForCausalLM,
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        attn_implementation="eager",
        use_cache=False,
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return _lm(
        GPT2Config,
        GPT2LMHeadModel,
        vocab_size=23,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        attn_implementation="eager",
        use_cache=False,
    )


def lora():
    from arisk.config.plan import AdapterConfig
    from arisk.models.selection import attach_adapter

    model, batch, loss_fn = llama()
    model = attach_adapter(model, AdapterConfig(r=3, alpha=6), seed=0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * 0.1)
    return model, batch, loss_fn


CASES = {"tiny": tiny, "mlp": mlp, "mlp_mean_loss": mlp_mean_loss, "llama": llama, "gpt2": gpt2, "lora": lora}


@functools.cache
def case(name):
    """Model, batch, loss, names, and the dense oracle (B, P) by ordinary autograd per sample."""
    from arisk.models.selection import select_parameters

    model, batch, loss_fn = CASES[name]()
    names = select_parameters(model, "auto")
    return model, batch, loss_fn, names, oracle(model, batch, loss_fn, names)


def oracle(model, batch, loss_fn, names):
    """Per-sample gradients written out plainly: one sample, one backward."""
    parameters = dict(model.named_parameters())
    rows = []
    size = len(next(iter(batch.values() if isinstance(batch, dict) else batch)))
    for i in range(size):
        one = (
            {k: v[i : i + 1] for k, v in batch.items()}
            if isinstance(batch, dict)
            else tuple(v[i : i + 1] for v in batch)
        )
        for p in parameters.values():
            p.grad = None
        loss_fn(model, one).mean().backward()
        rows.append(
            torch.cat(
                [
                    torch.zeros(parameters[n].numel(), dtype=parameters[n].dtype)
                    if parameters[n].grad is None
                    else parameters[n].grad.reshape(-1)
                    for n in names
                ]
            )
        )
    for p in parameters.values():
        p.grad = None
    return torch.stack(rows)


def gradients(model, batch, loss_fn, layout, engine):
    """(B, P) by an engine of the project."""
    from arisk.gradients import measuring, per_sample_gradients

    blocks = {}
    with measuring(model, layout):
        losses = per_sample_gradients(
            model, batch, loss_fn, layout, lambda n, b: blocks.setdefault(n, b.flatten(1)), engine=engine
        )
    return torch.cat([blocks[n] for n in layout.names], 1), losses


@contextlib.contextmanager
def in_float32(model):
    """The same model in float32, put back afterwards."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.float()
    try:
        yield
    finally:
        model.double()
        model.load_state_dict(kept)
