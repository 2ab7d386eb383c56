"""How long a device takes for a language model's work, and at how many joules.

A roofline (Williams, Waterman and Patterson, CACM 52(4), 2009) of three parts: arithmetic, memory, and the host's time
to tell the device what to do, as many kernels for a small layer as for a large one. On a GPU they go on beside one
another, so work takes as long as the slowest; on a CPU they follow one another, so it takes as long as all. For a model
of N parameters

  - a token that is read takes 2N FLOPs (Kaplan et al., arXiv:2001.08361, section 2.1; attention's own products, which
    grow with the length, are left out: 7% of SmolLM2-135M's at 512 tokens, and less of larger models');
  - a token that is trained on by LoRA takes 4N: 2N forward, 2N for the gradients of activations, and none for those of
    frozen weights. The adapter's own share, 6 FLOPs for each of its parameters, is left out: 1% and less of N;
  - training moves some bytes for each token, layer and unit of width, for activations. They decide where layers are
    narrow and caches small, as on a CPU;
  - a step of generation, one token of each row of a batch, reads all weights and the rows' keys and values once.

How well this predicts what it was not fitted on is in experiments/runtime.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from semcons_ray.errors import ConfigError
from semcons_ray.modeling.shapes import Shape

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """What the time of a model's work depends on.

    Attributes:
        parameters: Number of parameters, those of the embeddings included, though an input embedding of its own (6% of
            Llama 3.1 8B) is only looked up.
        layers: Number of layers.
        width: Size of a hidden vector; 0 leaves out what its activations take.
        key_value_bytes: Bytes that the key-value cache holds for a token.
        bytes_per_parameter: Bytes of a weight in memory.
    """

    parameters: Annotated[int, Field(gt=0)]
    layers: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(ge=0)] = 0
    key_value_bytes: NotNegative = 0.0
    bytes_per_parameter: Positive = 2.0

    @classmethod
    def of(cls, shape: Shape, bytes_per_parameter: float = 2.0) -> Model:
        """The model of a shape, with keys and values in 16 bits."""
        return cls(
            parameters=shape.parameters,
            layers=shape.layers,
            width=shape.hidden,
            key_value_bytes=2.0 * 2 * shape.keys * shape.layers,
            bytes_per_parameter=bytes_per_parameter,
        )

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        return self.parameters * self.bytes_per_parameter


MINILM = Model(parameters=10_646_784, layers=6, width=384)
"""The embedder all-MiniLM-L6-v2, without its word embeddings, which are only looked up: 6 layers of width 384, whose
feed-forward layers are 1,536 wide."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Rates:
    """How fast a device was with one model, from which its roofline follows.

    Attributes:
        measured_parameters: Number of that model's parameters, of 16 bits each.
        training_tokens_per_second: Tokens of fine-tuning with LoRA.
        generation_tokens_per_second: Tokens of answers, without the time in which prompts are read.
        generation_batch_size: Rows that were answered at once.
    """

    measured_parameters: Positive
    training_tokens_per_second: Positive
    generation_tokens_per_second: Positive
    generation_batch_size: Positive

    def roofline(self) -> dict[str, float]:
        """The fields of `Device` with which it predicts these rates, as long as memory bounds the generation."""
        steps_per_second = self.generation_tokens_per_second / self.generation_batch_size
        return {
            "peak_tflops": 4 * self.measured_parameters * self.training_tokens_per_second / 1e12,
            "memory_bandwidth_gb_s": 2 * self.measured_parameters * steps_per_second / 1e9,
            "training_utilization": 1.0,
            "generation_utilization": 1.0,
        }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Device:
    """A device on which clients or the server compute, or several that work as one.

    All numbers but `num` are of one device.

    Attributes:
        name: Its name in the table.
        description: What it is, for tables and reports.
        peak_tflops: Dense TFLOP/s in the dtype that is trained in.
        memory_gb: Memory for weights, in 10**9 bytes.
        memory_bandwidth_gb_s: Memory bandwidth, in 10**9 bytes/s.
        idle_watts: Power while it waits.
        busy_watts: Power while it works.
        training_utilization: Share of the peak that training and the reading of prompts reach; by default as measured
            with LoRA on A100 (profiles/devices.yaml, 8xa100-80gb).
        generation_utilization: Share of the bandwidth that generation reaches; by default as measured on an A100.
        training_layer_seconds: Time that the host takes to launch a training step, for each layer; 0 if it is hidden.
        generation_layer_seconds: Time that the host takes to launch a step of generation, for each layer.
        activation_bytes: Bytes that training moves for each token, layer and unit of width.
        overlaps: Whether arithmetic, memory and host work beside one another, as with a GPU, or one after the other.
        num: Number of devices that work as one.
        source: Where the numbers are from.
    """

    name: str = ""
    description: str = ""
    peak_tflops: Positive
    memory_gb: Positive
    memory_bandwidth_gb_s: Positive
    idle_watts: NotNegative
    busy_watts: Positive
    training_utilization: Share = 0.40
    generation_utilization: Share = 0.68
    training_layer_seconds: NotNegative = 0.0
    generation_layer_seconds: NotNegative = 0.0
    activation_bytes: NotNegative = 0.0
    overlaps: bool = True
    num: Annotated[int, Field(gt=0)] = 1
    source: str = ""

    @property
    def flops(self) -> float:
        """FLOP/s that training and the reading of prompts reach."""
        return self.num * self.peak_tflops * 1e12 * self.training_utilization

    @property
    def bytes_per_second(self) -> float:
        """Bytes that generation reads from memory in a second."""
        return self.num * self.memory_bandwidth_gb_s * 1e9 * self.generation_utilization

    def training_seconds(self, tokens: float, model: Model, steps: float = 0.0) -> float:
        """Time of fine-tuning with LoRA.

        Args:
            tokens: Tokens that go through the model, prompts and padding included.
            model: The model.
            steps: Number of batches that they go in; 0 leaves the host's time out.
        """
        return self._together(
            4 * model.parameters * tokens / self.flops,
            self.activation_bytes * model.layers * model.width * tokens / self.bytes_per_second,
            steps * model.layers * self.training_layer_seconds,
        )

    def generation_seconds(
        self, tokens: float, model: Model, batch: float, prompt_tokens: float = 0.0, context: float = 0.0
    ) -> float:
        """Time of answering prompts.

        Args:
            tokens: Tokens of all answers.
            model: The model.
            batch: Rows that are answered at once, on average.
            prompt_tokens: Tokens of all prompts, which are read before.
            context: Tokens before the one that is being written, in a row on average.
        """
        read = model.weight_bytes + batch * context * model.key_value_bytes
        step = self._together(
            2 * model.parameters * batch / self.flops,
            read / self.bytes_per_second,
            model.layers * self.generation_layer_seconds,
        )
        return self.embedding_seconds(prompt_tokens, model) + tokens / batch * step

    def embedding_seconds(self, tokens: float, model: Model) -> float:
        """Time of reading tokens once, as an embedder does: half of that of training on them."""
        return self.training_seconds(tokens, model) / 2

    def joules(self, busy_seconds: float, idle_seconds: float = 0.0) -> float:
        """Energy of all `num` devices while they work, and while they wait."""
        return self.num * (busy_seconds * self.busy_watts + idle_seconds * self.idle_watts)

    def fits(self, model: Model, setting: str = "federation.devices") -> None:
        """Refuse a model whose weights are larger than the memory.

        Raises:
            ConfigError: They are; the message names the setting to change.
        """
        memory = self.num * self.memory_gb * 1e9
        if model.weight_bytes > memory:
            raise ConfigError(
                f"{setting}: {self.name or 'a device'} has {memory / 1e9:,.0f} GB of memory, and the model's weights "
                f"take {model.weight_bytes / 1e9:,.0f} GB; choose a larger device or a smaller model"
            )

    def _together(self, arithmetic: float, memory: float, host: float) -> float:
        """Seconds of work of which each part alone takes so many seconds."""
        return max(arithmetic, memory, host) if self.overlaps else arithmetic + memory + host
