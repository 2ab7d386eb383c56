"""A language model: one base model with a place for a low-rank adapter, for fine-tuning, answering and scoring.

Clients take turns in it, each with its own adapter. The base stays frozen, in the dtype of the settings. Outside the
model, an adapter is a dict of float32 tensors (the master weights that the optimizer updates); inside, it is cast to
the compute dtype, so that no matrix product has to cast its input. The results of every method depend only on its
arguments: the same call gives the same bits, whichever client used the model before.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import operator
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

from semcons_ray.config import TEMPLATE_DATE, Attention, LoraConfig, ModelConfig, Quantization, TrainingConfig
from semcons_ray.config import GenerationConfig as GenerationSettings
from semcons_ray.errors import ModelError, SemconsError, first_line
from semcons_ray.messages import Prompt
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.by_row import Share, adapters_by_row
from semcons_ray.modeling.chat import ChatFormat, Encoded
from semcons_ray.modeling.client_model import Pair, Score, Targets
from semcons_ray.modeling.decoding import Decoding, Growing, chosen_tokens
from semcons_ray.modeling.device import enough_memory, is_out_of_memory, repeatable, to_device
from semcons_ray.modeling.engine import EngineRequest
from semcons_ray.modeling.footprint import LOSS_ROWS
from semcons_ray.modeling.fused import fuse
from semcons_ray.modeling.lora import alpha_of, attach_adapter, measure_sizes
from semcons_ray.modeling.masters import Masters, Parameters, load
from semcons_ray.modeling.optimizer import LOSS_SCALE, AdamW, LossScale
from semcons_ray.modeling.quantization import keep_trainable, loading_options
from semcons_ray.modeling.steps import Segment, num_steps, pack, steps_of

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
Adjust = Callable[[Parameters], None]
"""What an algorithm does to the gradients of the float32 master weights, before they are clipped and a step is
taken."""

MAGNITUDE = "lora_magnitude_vector"
"""Part of the names of DoRA's tensors: the size of each output's weights."""

SAVED = "modules_to_save"
"""Part of the names of modules that are trained whole."""

PADDING = 0
"""Id with which batches are padded. It is masked, so any id in the embedding will do; a tokenizer's own padding token
may not be in it."""

TRAIN_WITH_LESS = (
    "lower training.batch_size (with more training.gradient_accumulation_steps a step is as large) or "
    "model.max_length, or set training.gradient_checkpointing or training.auto_find_batch_size; if workers share a "
    "GPU, raise resources.gpus_per_worker"
)
ASK_LESS = (
    "lower generation.batch_size, generation.max_new_tokens or model.max_length; if workers share a GPU, raise "
    "resources.gpus_per_worker"
)
"""What helps where memory does not suffice."""

READ_EVERY = 8
"""Number of tokens after which a GPU is asked which answers have ended, for which it waits. A CPU, which is never
waited for, is asked after each."""


@dataclass(frozen=True)
class FineTuned:
    """The result of a round of fine-tuning.

    Attributes:
        loss: Mean training loss of a batch, in nats a token, weighted by the batches' response tokens.
        tokens: Tokens that went through the model, prompts included.
        optimizer: State of the optimizer; empty unless it is kept.
    """

    loss: float
    tokens: int
    optimizer: dict[str, Tensor]


@dataclass
class Lesson:
    """What a client is to learn, and with what; see `LanguageModel.fine_tune`."""

    adapter: Adapter
    pairs: Sequence[Pair]
    training: TrainingConfig
    generator: np.random.Generator
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    frozen: Adapter = field(default_factory=dict)
    adjust: Adjust | None = None


class Batch(NamedTuple):
    """Texts as the model reads them, with N tokens of responses.

    Attributes:
        inputs: By name, arguments of the model, (B, T) each: input_ids, and attention_mask (0 on padding; not where
            padding would be on the left and there is none) or, with packing, position_ids, which begin again with each
            text. Without a mask, transformers finds the texts by them.
        labels: Tokens of responses, (N,), row after row.
        weights: Weight of each label in the loss, (N,).
        scored: Where the label's logits are, (N,): the place before it, counted over all rows.
        targets: Where anything is learnt from `Targets`: tokens, (N, K) int64, and their probabilities, (N, K), for
            each label; else None.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    weights: Tensor
    scored: Tensor
    targets: tuple[Tensor, Tensor] | None = None


class LanguageModel:
    """A causal language model with a LoRA adapter.

    Args:
        name: The folder that `resolve_model` returned, or a hub id.
        lora: Rank, scaling, dropout and target modules of the adapter.
        dtype: Type of the base weights: "bfloat16", "float16" or "float32".
        device: A torch device.
        attn_implementation: How attention is computed; None: as transformers chooses.
        quantization: Bits of the base weights.
        max_length: Most tokens of a prompt with its response; longer examples are cut.
        system_prompt: See `ChatFormat`.
        chat_template_kwargs: Arguments for the chat template.
        template_date: See `ChatFormat`.
        seed: Seed of the initial adapter, which is the same for every client of this architecture (averaging needs it).
        trainings: Settings of the local updates that it is going to do; each way is tried once.

    Raises:
        ModelError: The model cannot be loaded, lacks a module that `lora.target_modules` names, cannot be quantised or
            trained here, has no such attention, or its tokenizer does not do (see `ChatFormat`).
    """

    def __init__(
        self,
        name: str,
        *,
        lora: LoraConfig,
        dtype: str,
        device: str,
        max_length: int,
        attn_implementation: Attention | None = None,
        quantization: Quantization = "none",
        system_prompt: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        template_date: date = TEMPLATE_DATE,
        seed: int = 0,
        trainings: Iterable[TrainingConfig] = (TrainingConfig(),),
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self._max_length = max_length
        self.dtype = dtype
        self._rounding = 1e-3 if dtype == "float32" else 0.4  # see `_check_packing`
        self._attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
        options = loading_options(quantization, dtype=dtype, device=device)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            base = self._load_base(name, getattr(torch, dtype), **options)
        except Exception as error:  # transformers raises many kinds; all of them mean the same to the user
            how = f" with model.quantization {quantization}" if quantization != "none" else ""
            how += f" with model.attn_implementation {attn_implementation}" if attn_implementation else ""
            raise ModelError(f"cannot load model {name}{how}: {first_line(error)}") from error
        self.chat = ChatFormat(
            self.tokenizer,
            name=name,
            max_length=max_length,
            system_prompt=system_prompt,
            template_kwargs=chat_template_kwargs,
            template_date=template_date,
        )
        self.ends = self.chat.ends(base.generation_config.eos_token_id)
        keep_trainable(base)
        self._decoding = Decoding.of(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = attach_adapter(base, lora, name)
        self._scored: Callable[[Tensor], Tensor] | None = None
        # After the adapter, which may be on the output embedding and wrap it.
        base.get_output_embeddings().register_forward_pre_hook(self._only_scored)
        if dtype == "float16":
            measure_sizes(model)
        self._parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
        self._fresh = {key: value.detach().float().cpu().clone() for key, value in self._parameters.items()}
        # An adapter in float32 is cheap, and so are its gradients; those of float16 activations need a scaled loss.
        self._scales_loss = dtype == "float16"
        self._compute_dtype = torch.float32 if dtype == "float16" else getattr(torch, dtype)
        for key, value in self._parameters.items():
            if MAGNITUDE in key:  # far larger than its changes, which bfloat16 would round away
                value.data = value.data.float()
            elif SAVED not in key:  # such a module reads what others give it, in their dtype
                value.data = value.data.to(self._compute_dtype)
        smaller = "choose a smaller model.name, a narrower model.dtype or model.quantization, or divide it by sharding"
        with enough_memory(f"hold model {name}", smaller):
            self.model: Any = model.to(self.device).eval()
        if self.device.type == "cuda":
            fuse(self.model)
        self._repeats = True
        self._fits = sys.maxsize
        self._read_every = READ_EVERY if self.device.type == "cuda" else 1
        self._peft_config = model.active_peft_config
        self._lora = lora
        self._scaling = lora.alpha / alpha_of(1.0, lora.rank, lora)
        self._rehearse({
            (training.gradient_checkpointing, training.packing, training.train_together > 1) for training in trainings
        })

    @classmethod
    def of(cls, settings: ModelConfig, folder: str, **more: Any) -> Self:
        """A model with the settings of a run, from the folder of one of its models; `more` are further arguments."""
        same = ("lora", "dtype", "max_length", "attn_implementation", "quantization", "system_prompt",
                "chat_template_kwargs", "template_date")  # fmt: skip
        return cls(folder, **{name: getattr(settings, name) for name in same}, **more)

    @property
    def writes(self) -> bool:
        """Whether this process writes clients' files; of several ranks, only the first does."""
        return True

    def _rehearse(self, ways: Iterable[tuple[bool, bool, bool]]) -> None:
        """Train and answer once, so that a model that cannot is refused before any client works.

        Args:
            ways: With gradient checkpointing or without, with packing or without, and together with others or alone.
        """
        pairs, generator = [Pair("a", "b"), Pair("a b a", "b a")], np.random.default_rng(0)
        twice = GenerationSettings(max_new_tokens=2, num_samples=2)
        try:
            for checkpointing, packing, together in sorted(ways):
                if packing:
                    self._check_packing()
                one_step = TrainingConfig(
                    batch_size=2, local_steps=1, gradient_checkpointing=checkpointing, packing=packing
                )
                self._rehearse_training(pairs, one_step)
                if together:
                    self._check_together(pairs, one_step)
            self.generate(self.fresh_adapter(), [pair.prompt for pair in pairs], twice, generator)
        except SemconsError:
            raise
        except Exception as error:  # whatever the model's own code raises
            how = "".join(f" with model.{key} {value}" for key, value in self._attention.items())
            why = f"{type(error).__name__}: {first_line(error)}"
            raise ModelError(f"model {self.name} cannot be trained and asked here{how}: {why}") from error

    def _rehearse_training(self, pairs: Sequence[Pair], one_step: TrainingConfig) -> None:
        """Train once; learn whether all that the model does on a GPU gives the same bits each time, as it is to."""
        try:
            self.fine_tune(self.fresh_adapter(), pairs, one_step, np.random.default_rng(0))
        except RuntimeError as error:
            if not self._repeats or "deterministic" not in str(error):
                raise
            logger.warning("model %s will not train to the same bits again on a GPU: %s", self.name, first_line(error))
            self._repeats = False
            self._rehearse_training(pairs, one_step)

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Check that texts in a row are read as each would be alone, whatever is before them.

        Their losses may differ by rounding: SmolLM2's in bfloat16 by 0.13 nats a token, as much as by padding, and if
        its texts saw each other by 1.0. What is before a text changes no bit of it, but perhaps in a mixture of
        experts.

        Raises:
            ModelError: They are not: the model's own code makes no use of `position_ids` to tell texts apart.
        """
        pairs = (Pair("a", "b"), Pair("b", "a"), Pair("a b", "b a"))
        encoded = [self._encode(pair) for pair in pairs]
        one, other, last = (Segment(ids, ((begin, len(ids)),)) for ids, begin in encoded)
        alone = self._token_nll(self._collate([[one], [last], [other], [last]]))
        together = self._token_nll(self._collate([[one, last], [other, last]], packed=True))
        parts = torch.split(together, [text.num_learnt for text in (one, last, other, last)])
        seen = [(together - alone).abs().mean(), 4 * (parts[1] - parts[3]).abs().max()]
        if not max(map(float, seen)) <= self._rounding:
            raise ModelError(
                f"training.packing does not fit {self.name}: what is before a text in its row changes its loss"
            )

    def _check_together(self, pairs: Sequence[Pair], one_step: TrainingConfig) -> None:
        """Check that clients that train together have the gradients that each has alone, but for rounding.

        Raises:
            ModelError: They have not: what a row is for depends on others, or a layer does not read whole rows.
        """
        seen: list[Tensor] = []

        def note(parameters: Parameters) -> None:
            grads = [value.grad for value in parameters.values() if value.grad is not None]
            seen.append(torch.cat([grad.flatten() for grad in grads]))

        def lesson(pair: Pair) -> Lesson:
            return Lesson(self.fresh_adapter(), [pair], one_step, np.random.default_rng(0), adjust=note)

        try:
            for pair in pairs:
                self.fine_tune_together([lesson(pair)])
            self.fine_tune_together([lesson(pair) for pair in pairs])
        except ValueError as error:
            raise ModelError(f"training.train_together does not fit {self.name}: {first_line(error)}") from error
        alone, together = seen[: len(pairs)], seen[len(pairs) :]
        apart = [(one - other).norm() / one.norm() for one, other in zip(alone, together, strict=True)]
        if not max(map(float, apart)) <= self._rounding:
            raise ModelError(
                f"training.train_together does not fit {self.name}: who is beside a client changes its gradients"
            )

    # Adapters ---------------------------------------------------------------------------------------------------

    def fresh_adapter(self, generator: np.random.Generator | None = None) -> Adapter:
        """An adapter whose update B A is zero: B is zero, and A is as PEFT draws it, uniform in +-1/sqrt(inputs) or, by
        `init_lora_weights`, normal with deviation 1/rank. With DoRA, sizes are those of the base weights.

        Without a generator it is the adapter from which every client of this architecture starts; with one, A is drawn.
        """
        adapter = {key: value.clone() for key, value in self._fresh.items()}
        if generator is not None:
            for key in [key for key in adapter if "lora_A" in key]:
                rank, inputs = adapter[key].shape
                if self._lora.init_lora_weights == "gaussian":
                    drawn = generator.standard_normal((rank, inputs), dtype=np.float32)
                    adapter[key] = torch.from_numpy(drawn) / rank
                else:
                    drawn = generator.random((rank, inputs), dtype=np.float32)
                    adapter[key] = torch.from_numpy(2 * drawn - 1) / inputs**0.5
        return adapter

    def load_adapter(self, adapter: Adapter) -> None:
        """Copy an adapter into the model; one of a lower rank is padded with zeros."""
        load(self._parameters, to_device([adapter[key] for key in self._parameters], self.device))

    @contextmanager
    def holding(self, adapter: Adapter, frozen: Adapter | None = None) -> Iterator[Any]:
        """The transformers model with an adapter in it, for what asks such a model; see `fine_tune` for `frozen`."""
        self.load_adapter(adapter)
        with torch.no_grad(), self._beside(frozen):
            yield self.model

    def export_adapter(self, adapter: Adapter, folder: Path) -> None:
        """Write an adapter of any rank to an existing folder, in PEFT's format."""
        rank = next(value.shape[0] for key, value in adapter.items() if "lora_A" in key)
        config = copy.copy(self._peft_config)
        config.r, config.lora_alpha = rank, alpha_of(self._scaling, rank, self._lora)
        config.inference_mode = True
        # Else an adapter on the output embedding would take the whole embedding along.
        tensors = get_peft_model_state_dict(self.model, adapter, save_embedding_layers=False)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config.save_pretrained(str(folder))

    # Work -------------------------------------------------------------------------------------------------------

    def fine_tune(
        self,
        adapter: Adapter,
        pairs: Sequence[Pair],
        training: TrainingConfig,
        generator: np.random.Generator,
        optimizer: dict[str, Tensor] | None = None,
        *,
        frozen: Adapter | None = None,
        adjust: Adjust | None = None,
    ) -> FineTuned:
        """Train `adapter` in place by AdamW on the responses of `pairs`.

        The loss of an optimizer step is the weighted mean over the response tokens of all its examples, in however many
        batches they go through the model; prompts are not learnt. Examples are shuffled each epoch, then sorted by
        length within a window of steps. With packing, so are rows of examples, which are the same in all epochs.

        Args:
            adapter: The adapter to train; it holds the result afterwards.
            pairs: Prompts and responses, with their weights in the loss.
            training: Settings of the local update.
            generator: Decides the order of examples, and dropout.
            optimizer: Optimizer state that an earlier call returned; None or empty: a new optimizer.
            frozen: An adapter of any rank that is added to the base model and not trained.
            adjust: Called with the master weights before each step, to change their gradients.
        """
        [learnt] = self.fine_tune_together(
            [Lesson(adapter, pairs, training, generator, optimizer or {}, frozen or {}, adjust)]
        )
        return learnt

    def fine_tune_together(self, lessons: Sequence[Lesson]) -> list[FineTuned]:
        """`fine_tune` for several clients at once: rows of all go through the model in one batch.

        Each client takes the steps that it would take alone, with its own loss, gradients, optimizer and random stream;
        one that has no more of them is done. So the results are those of one after another but for rounding: rows are
        padded to the longest of all clients, and matrix products have more of them. One lesson alone has the bits of
        `fine_tune`.

        Args:
            lessons: One for each client; settings by which batches are computed (packing, gradient checkpointing and
                smaller batches where memory does not suffice) are those of the first.
        """
        learners = [_Learner(lesson, self._rows(lesson)) for lesson in lessons]
        common = lessons[0].training
        size, remedy = f"training.batch_size {common.batch_size}", TRAIN_WITH_LESS
        if len(lessons) > 1:
            size, remedy = f"{size} of {len(lessons)} clients", f"lower training.train_together; or {remedy}"
        with (
            self._room_to("train", size, remedy),
            self._training(common),
            self._seeded([lesson.generator for lesson in lessons]),
            self._training_attention(common),
            self._adapters_of(learners) as shares,
            repeatable(self.device, self._repeats),
        ):
            for learner in learners:
                learner.begin(self._optimizer, LossScale(LOSS_SCALE if self._scales_loss else 1.0))
            while going := [learner for learner in learners if learner.goes_on()]:
                self._step_gradients(going, common, shares)
                for learner in going:
                    learner.take_step()
            for learner in learners:
                learner.lesson.adapter.update(learner.masters.to_adapter())
            # Read when all is done: a GPU that is asked after each step waits for the next.
            means = [torch.stack(learner.losses).tolist() if learner.losses else [] for learner in learners]
        return [learner.result(losses) for learner, losses in zip(learners, means, strict=True)]

    def _rows(self, lesson: Lesson) -> list[list[Segment]]:
        """The texts of a lesson, in rows."""
        segments = [segment for pair in lesson.pairs for segment in self._segments(pair)]
        lengths = [len(segment.ids) for segment in segments]
        alone = [[i] for i in range(len(segments))]
        together = pack(lengths, self._max_length, lesson.generator) if lesson.training.packing else alone
        return [[segments[i] for i in row] for row in together]

    @contextmanager
    def _adapters_of(self, learners: Sequence[_Learner]) -> Iterator[list[Share]]:
        """While the block runs, learners have weights that compute: the model's own if there is one, else each its own.

        Yields the list that is to say whose rows a batch has, if there are several.
        """
        shares = list[Share]()
        if len(learners) == 1:
            learners[0].computing = self._parameters
            with self._beside(learners[0].lesson.frozen):
                yield shares
            return
        for learner in learners:
            learner.computing = {
                key: torch.nn.Parameter(value.new_empty(learner.lesson.adapter[key].shape))
                for key, value in self._parameters.items()
            }
            learner.frozen = self._on_device(learner.lesson.frozen)
        with adapters_by_row(self.model, [*self._parameters], self._scaling, shares):
            yield shares

    def _step_gradients(self, learners: Sequence[_Learner], common: TrainingConfig, shares: list[Share]) -> None:
        """Put the gradients of each learner's optimizer step into its float32 master weights, and note its loss.

        If float16 overflows, they are computed again with half the loss scale, so that no example is left out.
        """
        while learners:
            for learner in learners:
                learner.masters.clear_gradients()
            parts = self._accumulate_what_fits(learners, common, shares)
            again = []
            for learner, part in zip(learners, parts, strict=True):
                with torch.no_grad():
                    loss = self._reduced(part, learner.masters.parameters)
                    fits = not self._scales_loss or not math.isfinite(loss.item()) or self._keeps(learner)
                if fits:
                    learner.losses.append(loss)
                else:
                    again.append(learner)
            learners = again

    def _keeps(self, learner: _Learner) -> bool:
        """See `LossScale.keeps`."""
        grads = [master.grad for master in learner.masters.parameters.values() if master.grad is not None]
        fits = all(bool(torch.isfinite(grad).all()) for grad in grads)
        return learner.scale.keeps(all(self.of_all_ranks(fits)))

    def _accumulate_what_fits(
        self, learners: Sequence[_Learner], common: TrainingConfig, shares: list[Share]
    ) -> list[Tensor]:
        """`_accumulate`; if `auto_find_batch_size`, in smaller batches where memory does not suffice, and from then on
        in all steps of this model."""
        while True:
            size = min(max(learner.lesson.training.batch_size for learner in learners), self._fits)
            try:
                return self._accumulate(learners, size, common, shares)
            except RuntimeError as error:
                if not (common.auto_find_batch_size and size > 1 and self._alone and is_out_of_memory(error)):
                    raise
            # After the block, whose error holds what the batch has in memory.
            self._fits = size // 2
            logger.warning("not enough memory to train on %d rows at a time; from now on %d", size, self._fits)
            for learner in learners:
                learner.masters.clear_gradients()
                learner.clear_gradients()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate(
        self, learners: Sequence[_Learner], size: int, common: TrainingConfig, shares: list[Share]
    ) -> list[Tensor]:
        """Add up the gradients of each learner's optimizer step, a batch of at most `size` of its rows at a time;
        returns the losses.

        With several ranks, both are this rank's part, which `_reduced` sums up. The backward pass is that of each loss
        times its learner's scale.
        """
        losses: list[list[Tensor]] = [[] for _ in learners]
        for parts in itertools.zip_longest(*(learner.batches(size) for learner in learners)):
            at_work = [(i, learners[i], part) for i, part in enumerate(parts) if part]
            mine = [self._share([*range(len(part))]) for _, _, part in at_work]
            rows = [[part[row] for row in own] for (_, _, part), (own, _) in zip(at_work, mine, strict=True)]
            batch = self._collate([*itertools.chain(*rows)], packed=common.packing)
            width = batch.inputs["input_ids"].numel() // sum(map(len, rows))
            shares[:] = [
                Share(learner.computing, learner.frozen, width * len(own))
                for (_, learner, _), own in zip(at_work, rows, strict=True)
            ]
            counts = [sum(segment.num_learnt for row in own for segment in row) for own in rows]
            whole = (self._token_nll(batch), batch.weights)  # even a split into one is joined again behind it
            nlls, weights = ([part] if len(counts) == 1 else torch.split(part, counts) for part in whole)
            scaled = []
            for (i, learner, _), (_, share), nll, weight in zip(at_work, mine, nlls, weights, strict=True):
                loss = (nll * (share * weight)).sum() / max(learner.total, 1e-9)
                scaled.append(learner.scale.factor * loss)
                losses[i].append(loss.detach())
            functools.reduce(operator.add, scaled).backward()  # type: ignore[no-untyped-call]
            for _, learner, _ in at_work:
                learner.masters.take_gradients(learner.scale.factor)
        return [torch.stack(each).sum() for each in losses]

    @torch.no_grad()
    def generate(
        self,
        adapter: Adapter,
        prompts: Sequence[Prompt],
        generation: GenerationSettings,
        generator: np.random.Generator,
        *,
        frozen: Adapter | None = None,
    ) -> tuple[list[str], int]:
        """Answer prompts in batches, `generation.num_samples` times; returns the first answers to all prompts, in their
        order, then the second ones and so on, and the number of tokens generated. An answer that `generation.stop` ends
        is cut before that text.

        Every answer has random numbers of its own, so neither the batch that it is in nor how many others are drawn
        changes what is drawn. Prompts are read once for all their answers.
        """
        prompt_ids = [self.chat.prompt_ids(prompt) for prompt in prompts]
        draws = generator.random((generation.num_samples, len(prompts), generation.max_new_tokens))
        order = sorted(range(len(prompts)), key=lambda i: (len(prompt_ids[i]), i))
        written: dict[tuple[int, int], list[int]] = {}
        with self._at_work(adapter, frozen, "answer", generation.batch_size):
            for batch in self._decoding.batches(order, [len(ids) for ids in prompt_ids], generation.batch_size):
                samples = self._written([prompt_ids[i] for i in batch], generation, draws[:, batch])
                written |= {
                    (sample, i): row for sample, rows in enumerate(samples) for i, row in zip(batch, rows, strict=True)
                }
        ends = self._ends(generation)
        answers = [[token for token in written[key] if token not in ends] for key in sorted(written)]
        return self.decode(answers, generation.stop), sum(map(len, written.values()))

    def engine_request(
        self,
        adapter: Adapter,
        prompts: Sequence[Prompt],
        generation: GenerationSettings,
        generator: np.random.Generator,
    ) -> EngineRequest:
        """The request with which an engine answers `prompts` as `generate` would, `num_samples` times; `decode` turns
        its answers into text."""
        with tempfile.TemporaryDirectory() as folder:
            self.export_adapter(adapter, Path(folder))
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return EngineRequest(
            prompts=[self.chat.prompt_ids(prompt) for prompt in prompts] * generation.num_samples,
            adapter=files,
            max_new_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            ends=self._ends(generation),
            stop=self.chat.stops(generation.stop),
            seeds=generator.integers(2**62, size=len(prompts) * generation.num_samples).tolist(),
        )

    def decode(self, answers: Sequence[Sequence[int]], stop: Sequence[str] = ()) -> list[str]:
        """Texts of answers, cut before the first of `stop`; each is given as token ids without the one that ended
        it."""
        return [self.chat.answer(ids, stop) for ids in answers]

    def _ends(self, generation: GenerationSettings) -> list[int]:
        return [*self.ends, *self.chat.marks(generation.stop)]

    def _written(
        self, texts: Sequence[list[int]], generation: GenerationSettings, draws: NDArray[np.float64]
    ) -> list[list[list[int]]]:
        """Generate the tokens that follow each text, including those that end it, for each sample; `draws` (S, B,
        max_new_tokens) is in [0, 1) and decides what is sampled."""
        batch = self._collate([[Segment(text)] for text in texts], pad_left=True)
        read = self._decoding.begin(self.model.config, **batch.inputs)
        first = self._next_logits(read)
        last = len(draws) - 1
        return [
            self._continued(read if sample == last else read.copy(), first, generation, theirs)
            for sample, theirs in enumerate(draws)
        ]

    def _continued(
        self, growing: Growing, first: Tensor, generation: GenerationSettings, draws: NDArray[np.float64]
    ) -> list[list[int]]:
        """Generate the tokens that follow each text of a batch that the model has read, whose logits of the next tokens
        are `first`, (B, V); `draws` is (B, max_new_tokens).

        A text that has ended leaves the batch, so that a few long answers don't cost as much as many. Whether it has is
        read after every `_read_every` tokens; what was generated behind an end is dropped.
        """
        rows: list[list[int]] = [[] for _ in draws]
        going, ends = [*range(len(draws))], self._ends(generation)
        (on_device,) = to_device([torch.from_numpy(draws)], self.device)
        unread: list[Tensor] = []
        for step in range(generation.max_new_tokens):
            logits = self._next_logits(growing) if step else first
            tokens = chosen_tokens(logits, generation, on_device[:, step])
            unread.append(tokens)
            if len(unread) == self._read_every or step == generation.max_new_tokens - 1:
                read, unread = torch.stack(unread, dim=1).tolist(), []
                done = [
                    self._goes_to_its_end(rows[row], new, ends, generation.stop)
                    for row, new in zip(going, read, strict=False)
                ]
                left = [place for place, row_is_done in enumerate(done) if not row_is_done]
                going = [going[place] for place in left]
                if not self._goes_on(bool(going)):
                    break
                left = left or [0]  # a stand-in: a rank that is done must go on in step with the others
                if len(left) < len(tokens):
                    (kept,) = to_device([torch.tensor(left)], self.device)
                    growing.keep(kept)
                    tokens, on_device = tokens[kept], on_device[kept]
            growing.append(tokens)
        return rows

    def _next_logits(self, growing: Growing) -> Tensor:
        """Logits of each text's next token, (B, V) float32."""
        self._scored = lambda hidden: hidden[:, -1].contiguous()
        logits: Tensor = self.model(**growing.inputs()).logits[0].float()
        return logits

    def _goes_to_its_end(self, row: list[int], new: Iterable[int], ends: Sequence[int], stop: Sequence[str]) -> bool:
        """Append new tokens to an answer as far as one ends it; whether one does."""
        for token in new:
            row.append(token)
            if token in ends or self.chat.is_stopped(row, stop):
                return True
        return False

    @torch.no_grad()
    def negative_log_likelihood(
        self, adapter: Adapter, pairs: Sequence[Pair], batch_size: int, *, frozen: Adapter | None = None
    ) -> Score:
        """Score how likely the responses of `pairs` are, in batches; see `fine_tune` for `frozen`."""
        texts = [self._texts(pair) for pair in pairs]
        segments = [[Segment(text.ids, text.learnt) for text in parts] for parts in texts]
        with self._at_work(adapter, frozen, "score answers", batch_size):
            nll = iter(self._segment_nll([*itertools.chain(*segments)], batch_size))
        return Score(
            nll=tuple(sum(itertools.islice(nll, len(parts))) for parts in segments),
            num_tokens=tuple(sum(segment.num_learnt for segment in parts) for parts in segments),
            num_bytes=tuple(sum(text.num_bytes for text in parts) for parts in texts),
            processed_tokens=sum(len(text.ids) for parts in texts for text in parts),
        )

    @torch.no_grad()
    def log_likelihoods(
        self, adapter: Adapter, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """How likely each token of answers is, in nats; prompts and answers are token ids, and go through the model
        together."""
        texts = [
            Segment([*prompt, *answer], ((len(prompt), len(prompt) + len(answer)),))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        with self._at_work(adapter, None, "score answers", len(texts)):
            nll = self._token_nll(self._collate([[text] for text in texts]))
        return [(-part).tolist() for part in torch.split(nll, [text.num_learnt for text in texts])]

    def response_ids(self, prompt: Prompt, response: str) -> list[int]:
        """Tokens of a response to a prompt, with those that end it."""
        text = self._texts(Pair(prompt, response))[-1]
        begin, end = text.learnt[-1]
        return text.ids[begin:end]

    @torch.no_grad()
    def likeliest(
        self,
        adapter: Adapter,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
        top_k: int,
        batch_size: int,
        *,
        frozen: Adapter | None = None,
    ) -> tuple[list[Targets], int]:
        """The `top_k` likeliest tokens at each place of answers, given as token ids; see `fine_tune` for `frozen`.

        Returns:
            For each prompt, these tokens and their probabilities among all, and the number of tokens that went through
            the model.
        """
        segments = [self._asked(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        order = sorted(range(len(segments)), key=lambda i: (len(segments[i].ids), i))
        found: dict[int, Targets] = {}
        with self._at_work(adapter, frozen, "score answers", batch_size):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                rows = self._collate([[segments[i]] for i in batch])
                parts = [part.float().softmax(dim=1).topk(top_k) for part in self._logits(rows)]
                chances, tokens = (torch.cat(one).cpu() for one in zip(*parts, strict=True))
                lengths = [len(answers[i]) for i in batch]
                by_answer = zip(torch.split(tokens, lengths), torch.split(chances, lengths), strict=True)
                found |= {i: Targets(answers[i], *likely) for i, likely in zip(batch, by_answer, strict=True)}
        return [found[i] for i in range(len(segments))], sum(len(segment.ids) for segment in segments)

    @torch.no_grad()
    def option_nll(
        self,
        adapter: Adapter,
        questions: Sequence[tuple[Prompt, Sequence[str]]],
        batch_size: int,
        *,
        frozen: Adapter | None = None,
    ) -> tuple[list[tuple[float, ...]], int]:
        """Score the options of multiple-choice questions as lm-eval does (see `ChatFormat.option`); see `fine_tune` for
        `frozen`.

        Returns:
            The NLL (nats) of each option of each question, and the number of tokens that went through the model.
        """
        texts = [[self.chat.option(prompt, option) for option in options] for prompt, options in questions]
        segments = [Segment(text.ids, text.learnt) for options in texts for text in options]
        with self._at_work(adapter, frozen, "score answers", batch_size):
            nll = iter(self._segment_nll(segments, batch_size))
        scored = [tuple(itertools.islice(nll, len(options))) for options in texts]
        return scored, sum(len(segment.ids) for segment in segments)

    def _segment_nll(self, segments: Sequence[Segment], batch_size: int) -> list[float]:
        """NLL (nats) of the responses of each segment, summed over its tokens in float64, (N,)."""
        order = sorted(range(len(segments)), key=lambda i: (len(segments[i].ids), i))
        nll = torch.zeros(len(segments), dtype=torch.float64, device=self.device)
        for start in range(0, len(order), batch_size):
            mine, counts = self._share(order[start : start + batch_size])
            losses = self._token_nll(self._collate([[segments[i]] for i in mine])).double()
            rows = torch.split(losses, [segments[i].num_learnt for i in mine])
            nll[mine] += counts * torch.stack([row.sum() for row in rows])
        return self._gathered(nll)

    # What `ShardedLanguageModel` replaces, where several ranks hold one model: see sharded.py ------------------------

    _alone = True
    """Whether what this process does next is for itself to decide: other ranks would not know of a batch in halves."""

    def of_all_ranks(self, value: Value) -> list[Value]:
        """The values that all ranks called this with, by rank."""
        return [value]

    def _load_base(self, name: str, dtype: torch.dtype, **options: Any) -> Any:
        base, read = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True, **self._attention, **options
        )
        if missing := sorted(read["missing_keys"]):  # transformers fills them with random numbers
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ModelError(f"its files hold no {missing[0]}{others}, which a {type(base).__name__} has")
        return base

    def _optimizer(
        self, masters: list[torch.nn.Parameter], training: TrainingConfig, state: dict[str, Tensor], num_steps: int
    ) -> AdamW:
        return AdamW(masters, training, state, num_steps)

    def _share(self, batch: list[int]) -> tuple[list[int], float]:
        """This rank's part of a batch, and its weight: 1, or 0 if there is no part for it and it gets a stand-in."""
        return batch, 1.0

    def _reduced(self, total: Tensor, masters: Parameters) -> Tensor:
        """The sum of `total` over all ranks; gradients of `masters` are summed in place."""
        return total

    def _gathered(self, nll: Tensor) -> list[float]:
        """The values of all segments, (N,), of which this rank has those of its own, and 0 for the others."""
        values: list[float] = nll.tolist()
        return values

    def _goes_on(self, unfinished: bool) -> bool:
        """Whether any rank has unfinished answers in the batch, so that all must generate another token."""
        return unfinished

    # Tokens -----------------------------------------------------------------------------------------------------

    def _texts(self, pair: Pair) -> list[Encoded]:
        """What is learnt or scored of a pair: see `ChatFormat.parts`."""
        return [self.chat.encode(*part) for part in self.chat.parts(pair.prompt, pair.response)]

    def _segments(self, pair: Pair) -> list[Segment]:
        """What is learnt of a pair."""
        if pair.targets is not None:
            return [self._asked(pair.prompt, pair.targets.answer)._replace(weight=pair.weight, targets=pair.targets)]
        return [Segment(text.ids, text.learnt, pair.weight) for text in self._texts(pair)]

    def _asked(self, prompt: Prompt, answer: Sequence[int]) -> Segment:
        """A question with an answer's tokens behind it."""
        ids = self.chat.prompt_ids(prompt)
        return Segment([*ids, *answer], ((len(ids), len(ids) + len(answer)),))

    def _encode(self, pair: Pair) -> tuple[list[int], int]:
        """Ids of a question with its answer, and where the answer begins."""
        [text] = self._texts(pair)
        [(begin, _)] = text.learnt
        return text.ids, begin

    def _collate(self, rows: Sequence[Sequence[Segment]], *, pad_left: bool = False, packed: bool = False) -> Batch:
        """A batch of rows, padded to the longest; only with `packed` may a row have several texts."""
        lengths = [sum(len(segment.ids) for segment in row) for row in rows]
        width = max(lengths)
        ids = torch.full((len(rows), width), PADDING)
        mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)  # each padding token is a text of its own
        labels, scored, weights = list[int](), list[int](), list[float]()
        for row, segments in enumerate(rows):
            end = width - lengths[row] if pad_left else 0
            for tokens, learnt, weight, _ in segments:
                begin, end = end, end + len(tokens)
                ids[row, begin:end] = torch.tensor(tokens)
                mask[row, begin:end] = 1
                positions[row, begin:end] = torch.arange(len(tokens))
                for first, last in learnt:
                    labels += tokens[first:last]
                    # The logits of a token are at the place before it.
                    scored += range(row * width + begin + first - 1, row * width + begin + last - 1)
                    weights += [weight] * (last - first)
        inputs = {"input_ids": ids}
        if packed:
            inputs["position_ids"] = positions
        elif not pad_left or min(lengths) < width:  # for each token, transformers looks whether anything is masked
            inputs["attention_mask"] = mask
        if packed and str(self.model.config._attn_implementation).startswith("flash"):
            # transformers tells flash attention of the texts in a batch's row only if the batch has no other.
            inputs = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
        whole = [*inputs.values(), *(torch.tensor(numbers, dtype=torch.long) for numbers in (labels, scored))]
        *read, on_labels, on_scored = to_device(whole, self.device)
        (on_weights,) = to_device([torch.tensor(weights, dtype=torch.float32)], self.device)
        targets = self._targets([segment for segments in rows for segment in segments])
        return Batch(dict(zip(inputs, read, strict=True)), on_labels, on_weights, on_scored, targets)

    def _targets(self, segments: Sequence[Segment]) -> tuple[Tensor, Tensor] | None:
        """See `Batch.targets`; what is learnt as it is written has its own tokens, with probability 1."""
        most = max((segment.targets.tokens.shape[1] for segment in segments if segment.targets), default=0)
        if not most:
            return None
        tokens, chances = list[Tensor](), list[Tensor]()
        for segment in segments:
            written = [segment.ids[place] for begin, end in segment.learnt for place in range(begin, end)]
            single = Targets(written, torch.tensor(written)[:, None], torch.ones(len(written), 1))
            _, likely, probabilities = segment.targets or single
            room = (0, most - likely.shape[1])
            tokens.append(torch.nn.functional.pad(likely, room))
            chances.append(torch.nn.functional.pad(probabilities, room))
        (on_tokens,), (on_chances,) = (to_device([torch.cat(part)], self.device) for part in (tokens, chances))
        return on_tokens, on_chances

    def _token_nll(self, batch: Batch) -> Tensor:
        """NLL (nats) of each label, (N,); where there are targets, cross-entropy with their probabilities."""
        parts = self._logits(batch)
        if batch.targets is None:
            wanted = torch.split(batch.labels, LOSS_ROWS)
            losses = [
                torch.nn.functional.cross_entropy(part.float(), labels, reduction="none")
                for part, labels in zip(parts, wanted, strict=True)
            ]
        else:
            tokens, chances = (torch.split(part, LOSS_ROWS) for part in batch.targets)
            losses = [
                -(part.float().log_softmax(dim=1).gather(1, likely) * probabilities).sum(dim=1)
                for part, likely, probabilities in zip(parts, tokens, chances, strict=True)
            ]
        return torch.cat(losses)

    def _logits(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits of the N scored positions, a few rows at a time: float32 copies of all would be the most memory that a
        model of many tokens takes."""
        self._scored = lambda hidden: hidden.flatten(0, 1).index_select(0, batch.scored)
        logits = self.model(**batch.inputs, use_cache=False).logits
        return torch.split(logits.squeeze(0), LOSS_ROWS)

    def _only_scored(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hook before the output embedding, so that only logits of the N scored positions are computed, (1, N, V)."""
        hidden, scored, self._scored = inputs[0], self._scored, None
        return (hidden if scored is None else scored(hidden)[None],)

    @contextmanager
    def _beside(self, frozen: Adapter | None) -> Iterator[None]:
        """While the block runs, a frozen adapter adds to the outputs of its modules."""
        handles = []
        there = self._on_device(frozen or {})
        for key in [key for key in there if "lora_A" in key]:
            module = self.model.get_submodule(key[: key.index(".lora_A")])
            handles.append(module.register_forward_hook(_adding(there[key], there[key.replace("lora_A", "lora_B")])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_device(self, frozen: Adapter) -> Adapter:
        """A frozen adapter as it is computed with, and its A times the scaling."""
        scaled = {key: self._scaling * frozen[key] if "lora_A" in key else frozen[key] for key in frozen}
        return {key: value.to(self.device, self._compute_dtype) for key, value in scaled.items()}

    @contextmanager
    def _at_work(self, adapter: Adapter, frozen: Adapter | None, work: str, batch_size: int) -> Iterator[None]:
        """While the block runs, an adapter is in the model, and a frozen one beside it; see `_room_to`."""
        with self._room_to(work, f"generation.batch_size {batch_size}", ASK_LESS), self._beside(frozen):
            self.load_adapter(adapter)
            yield

    @contextmanager
    def _training(self, training: TrainingConfig) -> Iterator[None]:
        """Training mode while the block runs. However it ends, the model is left as it was, for the next client."""
        self.model.train()
        base = self.model.get_base_model()
        if training.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            # Only the reentrant kind needs inputs that require gradients. The hook that makes them so would stay.
            base.disable_input_require_grads()
        try:
            yield
        finally:
            self.model.eval()
            if training.gradient_checkpointing:
                base.gradient_checkpointing_disable()
            self._scored = None
            self._clear_gradients()

    def _clear_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    # Determinism and speed --------------------------------------------------------------------------------------

    def _room_to(self, work: str, size: str, remedy: str) -> AbstractContextManager[None]:
        """See `enough_memory`."""
        lengths = f"model.max_length {self._max_length}"
        return enough_memory(f"{work} with model {self.name} at {size} and {lengths}", remedy)

    @contextmanager
    def _seeded(self, generators: Sequence[np.random.Generator]) -> Iterator[None]:
        """While the block runs, torch's global generator, from which dropout draws, is seeded; then it is restored.

        Each generator draws a seed, as it would alone. Where there are several, nothing is dropped out.
        """
        first, *_ = [int(generator.integers(2**62)) for generator in generators]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(first)
            yield

    def _training_attention(self, training: TrainingConfig) -> AbstractContextManager[Any]:
        # On CPUs the fused kernel's bfloat16 backward is slower than plain matrix products, but for packed rows: there
        # most products are of texts that do not see each other, and their memory costs more than the arithmetic.
        plain = self.device.type == "cpu" and not training.packing
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


class _Learner:
    """A lesson while it is learnt.

    Args:
        lesson: The lesson.
        rows: Its texts, in rows.

    Attributes:
        computing: The weights that compute. frozen: See `Share`. Both are set before `begin`.
        masters: Their master weights.
        scale: The scale of its loss.
        losses: The loss of each step that was taken.
        total: Weight of all that is learnt in the step at hand.
    """

    computing: Parameters
    masters: Masters
    scale: LossScale
    total: float

    def __init__(self, lesson: Lesson, rows: list[list[Segment]]) -> None:
        self.lesson = lesson
        self.frozen: Adapter = {}
        self.losses = list[Tensor]()
        self._rows = rows
        self._learnt = list[int]()
        self._processed = 0

    def begin(self, optimizer: Callable[..., AdamW], scale: LossScale) -> None:
        """Give the adapter's weights to those that compute, and draw the first step."""
        training, lengths = self.lesson.training, [sum(len(segment.ids) for segment in row) for row in self._rows]
        # In the model's order, whatever the adapter's: the optimizer's state goes by index.
        self.masters, self.scale = Masters(self.lesson.adapter, self.computing), scale
        self.masters.hand_over()
        trained = [*self.masters.parameters.values()]
        self._adamw = optimizer(trained, training, self.lesson.optimizer, num_steps(len(self._rows), training))
        self._steps = steps_of(lengths, training, self.lesson.generator)

    def goes_on(self) -> bool:
        """Go on to the next step, if there is one."""
        drawn = next(self._steps, None)
        self._step = [self._rows[i] for i in drawn or ()]
        self.total = sum(segment.weight * segment.num_learnt for row in self._step for segment in row)
        return drawn is not None

    def batches(self, most: int) -> Iterator[list[list[Segment]]]:
        """The rows of the step at hand, in batches of at most `most`."""
        size = min(self.lesson.training.batch_size, most)
        return (self._step[start : start + size] for start in range(0, len(self._step), size))

    def take_step(self) -> None:
        """Change the weights by the gradients that the master weights have."""
        with torch.no_grad():
            if self.lesson.adjust is not None:
                self.lesson.adjust(self.masters.parameters)
            self._adamw.step()
        self.masters.hand_over()
        self._learnt.append(sum(segment.num_learnt for row in self._step for segment in row))
        self._processed += sum(len(segment.ids) for row in self._step for segment in row)

    def clear_gradients(self) -> None:
        """Drop what a batch that was given up has left."""
        for parameter in self.computing.values():
            parameter.grad = None

    def result(self, means: Sequence[float]) -> FineTuned:
        """What comes of the lesson, by the mean losses of its steps."""
        loss_sum = 0.0
        for mean, responses in zip(means, self._learnt, strict=True):
            loss_sum += mean * responses
        state = self._adamw.state() if self.lesson.training.keep_optimizer else {}
        return FineTuned(loss=loss_sum / max(sum(self._learnt), 1), tokens=self._processed, optimizer=state)


def _adding(down: Tensor, up: Tensor) -> Callable[[torch.nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that adds `up` (out, r) times `down` (r, in) times the input."""
    return lambda _, inputs, output: output + (inputs[0].to(down.dtype) @ down.T @ up.T).to(output.dtype)
