"""LLaMA, as pieces from which every pass is put together.

B rows, T length, S key length, L layers, H heads, G key/value heads, P head
dim, D width, M mlp width, V vocabulary (padded). Read next: `vlm.py`.

A layer is two functions: `qkv` before attention and `output` after it. What
lies between (which keys, which mask) is up to the pass: one causal stream here,
two streams or a cache in `vlm.py`.

Source: LLaMA (arXiv 2302.13971), LLaMA 2 and 3, in the arithmetic of HF
transformers' `modeling_llama.py`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from vocojax.config import LlamaConfig, ModelConfig
from vocojax.models import attention, head, layers, rope


class RMSNorm(nn.Module):
  """Root-mean-square norm, statistics in float32."""

  eps: float
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
    return (x * scale).astype(self.dtype)


class SelfAttention(nn.Module):
  """The four projections of an attention block."""

  config: LlamaConfig
  dtype: str
  param_dtype: str

  def setup(self):
    c = self.config
    dense = _dense(c, self.dtype, self.param_dtype)
    self.q_proj = dense(c.num_attention_heads * c.head_dim)
    self.k_proj = dense(c.num_key_value_heads * c.head_dim)
    self.v_proj = dense(c.num_key_value_heads * c.head_dim)
    self.o_proj = dense(c.hidden_size)

  def qkv(self, x):
    def heads(projected):
      return projected.reshape(*x.shape[:-1], -1, self.config.head_dim)

    return heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))

  def output(self, attended):
    return self.o_proj(attended.reshape(*attended.shape[:-2], -1))


class Kernel(nn.Module):
  """The matrix of a projection without bias, in the compute dtype."""

  shape: tuple[int, int]
  model: ModelConfig

  @nn.compact
  def __call__(self) -> Float[Array, "In Out"]:
    init = nn.initializers.normal(self.model.llm.initializer_range)
    kernel = self.param("kernel", init, self.shape, self.model.param_dtype)
    return jnp.asarray(kernel, self.model.dtype)


class MLP(nn.Module):
  """SwiGLU feed-forward block, `config.mlp_chunks` parts of its width in turn.

  A part is a slice of M: its products, and in the backward pass its gradients,
  are gone before those of the next are made. Where the mesh splits the width
  over `tensor` there is one part.
  """

  model: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    D, M = self.model.llm.hidden_size, self.model.llm.intermediate_size
    gate, up, down = (
      Kernel(shape, self.model, name=name)()
      for name, shape in (
        ("gate_proj", (D, M)),
        ("up_proj", (D, M)),
        ("down_proj", (M, D)),
      )
    )

    def part(x, gate, up, down):
      hidden = nn.silu(layers.product(x, gate)) * layers.product(x, up)
      return layers.product(hidden, down)

    chunks = self.model.mlp_chunks
    # Where the mesh splits the width, cutting it again would undo that.
    if chunks == 1 or layers.num_shards("tensor") > 1:
      return part(x, gate, up, down)

    # The gradient of x is a sum over parts, not to be rounded each time.
    x, dtype = x.astype(jnp.float32), x.dtype

    def add(total, kernels):
      return total + part(x.astype(dtype), *kernels).astype(jnp.float32), None

    total, _ = jax.lax.scan(
      jax.checkpoint(add, prevent_cse=False),
      jnp.zeros(x.shape, jnp.float32),
      (
        gate.reshape(D, chunks, -1).swapaxes(0, 1),
        up.reshape(D, chunks, -1).swapaxes(0, 1),
        down.reshape(chunks, -1, D),
      ),
    )
    return total.astype(dtype)


class DecoderLayer(nn.Module):
  """One block, cut open at its attention."""

  model: ModelConfig

  def setup(self):
    c, dtypes = self.model.llm, (self.model.dtype, self.model.param_dtype)
    norm = functools.partial(RMSNorm, c.rms_norm_eps, *dtypes)
    self.input_layernorm = norm()
    self.self_attn = SelfAttention(c, *dtypes)
    self.post_attention_layernorm = norm()
    self.mlp = MLP(self.model)

  def qkv(
    self, x: Float[Array, "B T D"]
  ) -> tuple[
    Float[Array, "B T H P"], Float[Array, "B T G P"], Float[Array, "B T G P"]
  ]:
    """Queries, keys and values before rotation."""
    return self.self_attn.qkv(self.input_layernorm(x))

  def output(
    self, x: Float[Array, "B T D"], attended: Float[Array, "B T H P"]
  ) -> Float[Array, "B T D"]:
    """Both residual branches, given what attention gathered."""
    x = x + self.self_attn.output(attended)
    return x + self.mlp(self.post_attention_layernorm(x))

  def __call__(self, x):  # for `init` only: touches every parameter
    return self.output(x, self.qkv(x)[0])


def _dense(config: LlamaConfig, dtype: str, param_dtype: str):
  return functools.partial(
    layers.Dense,
    use_bias=False,
    dtype=dtype,
    param_dtype=param_dtype,
    kernel_init=nn.initializers.normal(config.initializer_range),
  )


@dataclasses.dataclass(frozen=True)
class Llama:
  """The language model as pure functions of its parameters.

  Parameters: `embed_tokens/embedding` [V, D], `layers/...` stacked on axis 0,
  `norm/scale` [D] and, unless tied, `lm_head/kernel` [D, V].
  """

  model: ModelConfig

  @property
  def config(self) -> LlamaConfig:
    return self.model.llm

  @property
  def layer(self) -> DecoderLayer:
    return DecoderLayer(self.model)

  @property
  def _norm(self) -> RMSNorm:
    return RMSNorm(
      self.config.rms_norm_eps, self.model.dtype, self.model.param_dtype
    )

  def init(self, key) -> dict:
    """Random parameters, normal with `initializer_range`."""
    c, param_dtype = self.config, self.model.param_dtype
    embed_key, layer_key, head_key = jax.random.split(key, 3)
    normal = nn.initializers.normal(c.initializer_range)
    shape = (c.padded_vocab_size, c.hidden_size)
    x = jnp.zeros((1, 1, c.hidden_size), self.model.dtype)
    params = {
      "embed_tokens": {"embedding": normal(embed_key, shape, param_dtype)},
      "layers": layers.init_stack(
        self.layer, layer_key, c.num_hidden_layers, x
      ),
      "norm": self._norm.init(head_key, x)["params"],
    }
    if not c.tie_word_embeddings:
      kernel = normal(head_key, shape[::-1], param_dtype)
      params["lm_head"] = {"kernel": kernel}
    return params

  def qkv(self, layer_params, x):
    """`DecoderLayer.qkv` with the parameters of one layer."""
    return self.layer.apply({"params": layer_params}, x, method="qkv")

  def output(self, layer_params, x, attended):
    """`DecoderLayer.output` with the parameters of one layer."""
    return self.layer.apply(
      {"params": layer_params}, x, attended, method="output"
    )

  def rotate(self, x, position_ids):
    """Queries or keys to their positions."""
    return rope.rotate(x, position_ids, self.config.rope)

  def embed(
    self, params, input_ids: Int[Array, "..."]
  ) -> Float[Array, "... D"]:
    """Token embeddings in the compute dtype."""
    table = params["embed_tokens"]["embedding"]
    return jnp.take(table, input_ids, axis=0).astype(self.model.dtype)

  def logits(self, params, x: Float[Array, "... D"]) -> Float32[Array, "... V"]:
    """Final norm and head; padded vocabulary rows get the float32 minimum."""
    x = self._norm.apply({"params": params["norm"]}, x)
    return head.logits(x, self._head_kernel(params), self.config.vocab_size)

  def token_losses(
    self, params, x: Float[Array, "B T D"], targets: Int[Array, "B T"]
  ) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """Final norm, head, and cross-entropy; see `head.token_losses`."""
    x = self._norm.apply({"params": params["norm"]}, x)
    return head.token_losses(
      x,
      self._head_kernel(params),
      targets,
      self.config.vocab_size,
      self.model.logits_chunk,
    )

  def distilled_losses(
    self,
    params,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    teacher_params,
    teacher_x: Float[Array, "B T D"],
  ) -> head.DistilledLosses:
    """With final norm and head; see `head.distilled_losses`."""

    def normed(params, x):
      return self._norm.apply({"params": params["norm"]}, x)

    return head.distilled_losses(
      normed(params, x),
      self._head_kernel(params),
      targets,
      self.config.vocab_size,
      self.model.logits_chunk,
      normed(teacher_params, teacher_x),
      self._head_kernel(teacher_params),
    )

  def _head_kernel(self, params) -> Float[Array, "D V"]:
    if self.config.tie_word_embeddings:
      return jnp.asarray(params["embed_tokens"]["embedding"]).T
    return jnp.asarray(params["lm_head"]["kernel"])

  def run(
    self,
    params,
    x: Float[Array, "B S D"],
    position_ids: Int[Array, "B S"],
    mask: Bool[Array, "B S S"],
  ) -> tuple[Float[Array, "B S D"], Float[Array, "L B S D"]]:
    """One stream under any mask, as an additive attention bias.

    Returns:
      The output of the last layer, before the final norm, and of every layer.
    """
    bias = attention.bias_from_mask(mask)

    def body(x, layer_params):
      q, k, v = self.qkv(layer_params, x)
      q, k = self.rotate(q, position_ids), self.rotate(k, position_ids)
      attended = attention.attend_with_bias(q, k, v, bias)
      x = layers.shard_rows(self.output(layer_params, x, attended))
      return x, x

    return layers.run_stack(body, x, params["layers"], self.model)
