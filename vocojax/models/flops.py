"""Floating-point operations of a model, by formula. Read next: `vlm.py`.

A product of [m, n] with [n, p] counts 2 m n p, the convention of most papers;
norms, activations and softmax are left out. Attention counts the pairs of a
query and a key that the mask allows, 4 L H P operations each: half of them for
the scores, half for the weighted sum. A kernel that computes a whole square of
a causal mask does up to twice that work for the same result.

L layers, H heads, G key/value heads, P head dim, D width, M mlp width, V
vocabulary.
"""

from vocojax.config import LlamaConfig, ModelConfig


def vision(config: ModelConfig) -> int:
  """Of the vision tower and the projector, for one image."""
  c = config.vision
  tokens, width = c.num_patches + 1, c.hidden_size
  patches = 2 * c.num_patches * 3 * c.patch_size**2 * width
  per_token = 2 * (4 * width * width + 2 * width * c.intermediate_size)
  layer = tokens * per_token + 4 * width * tokens * tokens
  projector = width * config.llm.hidden_size
  if config.projector == "mlp2x_gelu":
    projector += config.llm.hidden_size**2
  return patches + c.num_feature_layers * layer + 2 * c.num_patches * projector


def per_token(config: LlamaConfig) -> int:
  """Of the products of all layers with one token; no attention, no head."""
  c = config
  queries = c.hidden_size * c.num_attention_heads * c.head_dim
  keys = c.hidden_size * c.num_key_value_heads * c.head_dim
  mlp = 3 * c.hidden_size * c.intermediate_size
  return 2 * c.num_hidden_layers * (2 * queries + 2 * keys + mlp)


def per_pair(config: LlamaConfig) -> int:
  """Of one query meeting one key, in all layers and heads."""
  c = config
  return 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim


def head(config: LlamaConfig) -> int:
  """Of the logits of one position; the real vocabulary, without padding."""
  return 2 * config.hidden_size * config.vocab_size


def causal(config: LlamaConfig, num_tokens: int, num_before: int = 0) -> int:
  """Of all layers reading some tokens, each seeing itself and those before.

  Args:
    config: of the language model.
    num_tokens: tokens that are read.
    num_before: cached tokens that all of them see.
  """
  pairs = num_tokens * num_before + num_tokens * (num_tokens + 1) // 2
  return num_tokens * per_token(config) + pairs * per_pair(config)
