"""The same model written the usual way in PyTorch. Next: `train_step.py`.

B text rows of one image each, A image-stream length, T text length, S = A + T,
H heads, D width, V vocabulary.

As LLaVA and VoCo-LLaMA do it on Hugging Face models: one joint sequence
[<s>, patches, suffix, VoCo, text] for every row, a dense 4-D mask given to
`F.scaled_dot_product_attention`, the output head on all rows of the joint
sequence, cross-entropy with ignored labels. Modules are named like our
parameters, so that weights go over by name. Query and key heads are equal in
number, and the output head is not tied. In bfloat16 it is autocast's mixed
precision, as Hugging Face's trainer has it: weights stay in float32.
"""

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vocojax.config import LlamaConfig, ModelConfig, OptimizerConfig
from vocojax.models.clip import IMAGE_MEAN, IMAGE_STD
from vocojax.models.compressors import ImageStream
from vocojax.training import state

_ACTIVATIONS = {
  "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
  "gelu": F.gelu,
}


class VisionEmbeddings(nn.Module):
  def __init__(self, c):
    super().__init__()
    self.patch_embedding = nn.Conv2d(
      3, c.hidden_size, c.patch_size, c.patch_size, bias=False
    )
    self.class_embedding = nn.Parameter(torch.empty(c.hidden_size))
    self.position_embedding = nn.Parameter(
      torch.empty(1 + c.num_patches, c.hidden_size)
    )

  def forward(self, pixels):
    x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
    first = self.class_embedding.expand(x.shape[0], 1, -1)
    return torch.cat([first, x], dim=1) + self.position_embedding


class VisionLayer(nn.Module):
  def __init__(self, c):
    super().__init__()
    D, M = c.hidden_size, c.intermediate_size
    self.heads = c.num_attention_heads
    self.activation = _ACTIVATIONS[c.hidden_act]
    self.layer_norm1 = nn.LayerNorm(D, c.layer_norm_eps)
    self.layer_norm2 = nn.LayerNorm(D, c.layer_norm_eps)
    self.q_proj, self.k_proj = nn.Linear(D, D), nn.Linear(D, D)
    self.v_proj, self.out_proj = nn.Linear(D, D), nn.Linear(D, D)
    self.fc1, self.fc2 = nn.Linear(D, M), nn.Linear(M, D)

  def forward(self, x):
    y = self.layer_norm1(x)
    q, k, v = (
      _split_heads(proj(y), self.heads)
      for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    y = F.scaled_dot_product_attention(q, k, v)
    x = x + self.out_proj(_join_heads(y))
    y = self.activation(self.fc1(self.layer_norm2(x)))
    return x + self.fc2(y)


class Vision(nn.Module):
  """CLIP's vision tower; runs up to the layer whose features are used."""

  def __init__(self, c):
    super().__init__()
    self.embeddings = VisionEmbeddings(c)
    self.pre_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
    self.layers = nn.ModuleList(
      VisionLayer(c) for _ in range(c.num_hidden_layers)
    )
    self.num_feature_layers = c.num_feature_layers
    self.mean, self.std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)

  def forward(self, images):  # uint8 [B, S, S, 3]
    pixels = (images.float() / 255 - self.mean) / self.std
    x = self.pre_layernorm(self.embeddings(pixels.permute(0, 3, 1, 2)))
    for layer in self.layers[: self.num_feature_layers]:
      x = layer(x)
    return x[:, 1:]


class Projector(nn.Module):
  def __init__(self, config: ModelConfig):
    super().__init__()
    D = config.llm.hidden_size
    self.linear_1 = nn.Linear(config.vision.hidden_size, D)
    if config.projector == "mlp2x_gelu":
      self.linear_2 = nn.Linear(D, D)

  def forward(self, x):
    x = self.linear_1(x)
    return self.linear_2(F.gelu(x)) if hasattr(self, "linear_2") else x


class SelfAttention(nn.Module):
  def __init__(self, c: LlamaConfig):
    super().__init__()
    self.heads = c.num_attention_heads
    width = self.heads * c.head_dim
    self.q_proj = nn.Linear(c.hidden_size, width, bias=False)
    self.k_proj = nn.Linear(c.hidden_size, width, bias=False)
    self.v_proj = nn.Linear(c.hidden_size, width, bias=False)
    self.o_proj = nn.Linear(width, c.hidden_size, bias=False)

  def forward(self, x, cos, sin, mask):
    q = _rotate(_split_heads(self.q_proj(x), self.heads), cos, sin)
    k = _rotate(_split_heads(self.k_proj(x), self.heads), cos, sin)
    v = _split_heads(self.v_proj(x), self.heads)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return self.o_proj(_join_heads(x))


class MLP(nn.Module):
  def __init__(self, c: LlamaConfig):
    super().__init__()
    D, M = c.hidden_size, c.intermediate_size
    self.gate_proj = nn.Linear(D, M, bias=False)
    self.up_proj = nn.Linear(D, M, bias=False)
    self.down_proj = nn.Linear(M, D, bias=False)

  def forward(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
  def __init__(self, c: LlamaConfig):
    super().__init__()
    self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
    self.self_attn = SelfAttention(c)
    self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
    self.mlp = MLP(c)

  def forward(self, x, cos, sin, mask):
    x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
    return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
  def __init__(self, c: LlamaConfig):
    super().__init__()
    assert c.num_attention_heads == c.num_key_value_heads
    assert not c.tie_word_embeddings and c.rope.scaling == "none"
    self.config = c
    self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
    self.layers = nn.ModuleList(
      DecoderLayer(c) for _ in range(c.num_hidden_layers)
    )
    self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
    self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

  def forward(self, x, position_ids, mask):
    P = self.config.head_dim
    frequencies = self.config.rope.theta ** (-torch.arange(0, P, 2) / P)
    angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)[:, None]
    cos, sin = angles.cos(), angles.sin()
    for layer in self.layers:
      x = layer(x, cos, sin, mask)
    return self.lm_head(self.norm(x))


class VisionLanguageModel(nn.Module):
  """Loss of a batch over the joint sequence."""

  def __init__(self, config: ModelConfig, stream: ImageStream):
    super().__init__()
    self.stream = stream
    self.vision = Vision(config.vision)
    self.projector = Projector(config)
    self.llm = Llama(config.llm)
    self.before = torch.tensor(stream.before)
    self.after = torch.tensor(stream.after)

  def forward(self, images, input_ids, labels, segment_ids):
    """Mean cross-entropy of a batch as `train_step.random_batch` makes it."""
    B, A = input_ids.shape[0], self.stream.length
    embed = self.llm.embed_tokens
    patches = self.projector(self.vision(images[:, 0]))
    x = torch.cat(
      [
        embed(self.before).expand(B, -1, -1),
        patches,
        embed(self.after).expand(B, -1, -1),
        embed(input_ids),
      ],
      dim=1,
    )
    mask, position_ids = joint_mask(segment_ids, self.stream)
    logits = self.llm(x, position_ids, mask)
    # The row before a label predicts it, if it is of the same conversation.
    starts = segment_ids != F.pad(segment_ids[:, :-1], (1, 0))
    targets = F.pad(labels.masked_fill(starts, -100), (A - 1, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())


def joint_mask(segment_ids, stream: ImageStream):
  """Additive two-stage mask [B, 1, S, S] and positions [B, S].

  Additive, as VoCo-LLaMA has it; from a boolean one every layer would make it.
  Segments, and padding, each see themselves and the VoCo tokens.
  """
  segments = F.pad(segment_ids, (stream.length, 0), value=-1)
  index = torch.arange(segments.shape[1])
  visible = torch.isin(index, torch.tensor(stream.visible))
  allowed = segments[:, :, None] == segments[:, None, :]
  allowed = (allowed | visible) & (index[:, None] >= index)
  lowest = torch.finfo(torch.float32).min
  mask = torch.zeros(allowed.shape).masked_fill(~allowed, lowest)
  starts = segments != F.pad(segments[:, :-1], (1, 0), value=-1)
  first = torch.where(starts, index - stream.length, 0).cummax(dim=1).values
  return mask[:, None], index - first


def _split_heads(x, heads: int):
  return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join_heads(x):
  return x.transpose(1, 2).flatten(2)


def _rotate(x, cos, sin):
  first, second = x.chunk(2, dim=-1)
  return x * cos + torch.cat([-second, first], dim=-1) * sin


def from_params(
  config: ModelConfig, stream: ImageStream, params
) -> VisionLanguageModel:
  """The torch model with our weights, none of them left over but one norm.

  That norm comes after the vision tower's last layer; patch features do not
  use it.
  """
  model = VisionLanguageModel(config, stream)
  vocab, p = config.llm.vocab_size, config.vision.patch_size
  params = jax.tree.map(np.asarray, params)
  weights = {}
  for path, x in state.flatten(params).items():
    name = path.replace("/", ".")
    name = name.replace("kernel", "weight").replace("scale", "weight")
    name = name.replace("embed_tokens.embedding", "embed_tokens.weight")
    if ".layers." in name:
      for i, y in enumerate(x):
        weights[name.replace(".layers.", f".layers.{i}.")] = y.T
    elif "patch_embedding" in path:  # rows, columns, channels of a patch
      weights[name] = x.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)
    elif path.startswith("llm/lm_head"):
      weights[name] = x[:, :vocab].T
    elif path.startswith("llm/embed_tokens"):
      weights[name] = x[:vocab]
    elif "post_layernorm" not in path:
      weights[name] = x.T if path.endswith("kernel") else x
  model.load_state_dict({k: torch.tensor(x) for k, x in weights.items()})
  return model


def make_train_step(
  model: VisionLanguageModel, config: OptimizerConfig, dtype: str = "float32"
):
  """`batch -> loss`, with clipping and fused AdamW; updates the model."""
  decayed, kept = [], []
  for name, parameter in model.named_parameters():
    path = name.replace(".", "/")
    if state.matches(path, config.freeze):
      parameter.requires_grad_(False)
    else:
      plain = state.matches(path, config.no_decay)
      (kept if plain else decayed).append(parameter)
  optimizer = torch.optim.AdamW(
    [{"params": decayed}, {"params": kept, "weight_decay": 0.0}],
    lr=config.learning_rate,
    betas=(config.b1, config.b2),
    eps=config.eps,
    weight_decay=config.weight_decay,
    fused=True,
  )

  def train_step(batch):
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(
      batch["images"].device.type, torch.bfloat16, enabled=dtype == "bfloat16"
    ):
      loss = model(
        batch["images"],
        batch["input_ids"],
        batch["labels"],
        batch["segment_ids"],
      )
    loss.backward()
    nn.utils.clip_grad_norm_(decayed + kept, config.grad_clip)
    optimizer.step()
    return loss

  return train_step
