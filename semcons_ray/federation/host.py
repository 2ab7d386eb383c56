"""A host: the clients of one model, which take turns in it; where it is a base model in memory, each with an adapter.

A client's state, such as its adapter, lives in its store between visits, not in the host. So a host of one client
and a host of a hundred do the same work on a visit, memory does not grow with the clients, and a host that died is
replaced by any other.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from semcons_ray.config import ByClient, GenerationConfig
from semcons_ray.data.examples import Example
from semcons_ray.errors import ClientError, MessageError, NotFiniteError, SemconsError, UserError, writing
from semcons_ray.evaluation.harness import Harness
from semcons_ray.federation.fleet import NO_OTHERS, Algorithm, Evaluation, Reply
from semcons_ray.federation.store import ClientStore, Files, check_mark, sees_mark
from semcons_ray.federation.weights import Shapes, shapes_of
from semcons_ray.messages import Prompt, PublicPrompts
from semcons_ray.metering.gpus import this_place
from semcons_ray.metering.ledger import Ledger
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.client_model import ClientModel

if TYPE_CHECKING:
    from semcons_ray.federation.client import Client, Duties

logger = logging.getLogger(__name__)


class Models(ByClient[ClientModel], Protocol):
    """The models of clients, by client id."""

    @property
    def first_adapter(self) -> Adapter:
        """See `Host.first_adapter`."""
        ...

    @property
    def writes(self) -> bool:
        """Whether this process writes clients' files; of several ranks that hold a model, only the first does."""
        ...


class ModelsSpec(Protocol):
    """What a worker makes its clients' models from; see `AdapterModels` and `KindModels`."""

    @property
    def environment(self) -> tuple[str, ...]:
        """Names of the environment variables that the worker needs besides those that all have."""
        ...

    @property
    def keeps_files(self) -> bool:
        """Whether models write files of their own to the run's folder while they work, so that they must see it."""
        ...

    def make(self, seed: int, ledger: Ledger) -> Models:
        """The models of its clients; GPUs that they use are noted in the ledger."""
        ...


@dataclass(frozen=True)
class HostSpec:
    """Everything a worker needs to build its host. It is the same for all workers of a model, any of which may be asked
    for any of its clients, and is sent to each once.

    Attributes:
        models: What the clients' models are made from.
        algorithm: What the clients do on a visit.
        private: Private examples by client id.
        generation: Settings of answers by client id.
        public_prompts: The encoded `PublicPrompts` message; empty where the algorithm uses none.
        test: The held-out test set.
        num_answers: Number of test prompts answered at an evaluation.
        seed: The experiment's seed.
        state: Folder of the client stores.
        mark: Name of the file by which the driver marked that folder; see `store.mark`.
        scores_options: Whether the options of test prompts are scored at an evaluation.
        harness: Runs tasks of lm-eval; None: there are none.
    """

    models: ModelsSpec
    algorithm: Algorithm
    private: ByClient[Sequence[Example]]
    generation: ByClient[GenerationConfig]
    public_prompts: bytes
    test: tuple[Example, ...]
    num_answers: int
    seed: int
    state: Path
    mark: str
    scores_options: bool = False
    harness: Harness | None = None

    @property
    def environment(self) -> tuple[str, ...]:
        """See `HostSpecProtocol.environment`."""
        return self.models.environment

    def build(self, worker: str) -> ClientHost:
        """Make the host of a worker, by its name in the ledger.

        If it does not see the folder that the driver marked, it has one of its own, for files that come with visits.

        Raises:
            RunFolderError: It does not see it, and its models must.
            UserError: A model cannot be found, loaded or made.
        """
        if self.models.keeps_files:
            check_mark(self.state, self.mark)
        from semcons_ray.federation.client import Duties

        ledger = Ledger(worker, this_place(uses_gpu=False).node)
        with ledger.stage("load", round=0):
            models = self.models.make(self.seed, ledger)
            prompts: tuple[Prompt, ...] = ()
            if self.public_prompts:
                prompts = PublicPrompts.decode(self.public_prompts).prompts
        duties = Duties(prompts, self.test, self.num_answers, self.seed, self.scores_options, self.harness)
        clients = Clients(self.private, self.generation, duties, models, ledger)
        state = self.state if sees_mark(self.state, self.mark) else Path(tempfile.mkdtemp(prefix="semcons-state-"))
        store = ClientStore(state, writes=models.writes)
        return ClientHost(clients, self.algorithm, store, ledger, prompt_bytes=len(self.public_prompts))


@dataclass(frozen=True)
class Clients:
    """The clients of a model, by id. Each is made when it is asked for and not kept, so that memory does not grow with
    their number.

    Attributes:
        private: See `HostSpec`.
        generation: See `HostSpec`.
        duties: What they have in common.
        models: Their models.
        ledger: Where their work is recorded.
    """

    private: ByClient[Sequence[Example]]
    generation: ByClient[GenerationConfig]
    duties: Duties
    models: Models
    ledger: Ledger

    def __getitem__(self, client_id: int, /) -> Client:
        """The client, as one that has not learnt yet."""
        from semcons_ray.federation.client import Client

        return Client(
            client_id,
            self.private[client_id],
            generation=self.generation[client_id],
            duties=self.duties,
            model=self.models[client_id],
            ledger=self.ledger,
        )


class ClientHost:
    """Clients that share a base model; visits are exactly once, whatever crashes between them.

    Args:
        clients: The clients by id.
        algorithm: What they do on a visit.
        store: Where their states and replies are kept.
        ledger: This worker's ledger.
        prompt_bytes: Length of the `PublicPrompts` message, which a client gets once, at its first visit.
    """

    def __init__(
        self,
        clients: Clients,
        algorithm: Algorithm,
        store: ClientStore,
        ledger: Ledger,
        *,
        prompt_bytes: int,
    ) -> None:
        self.clients = clients
        self.algorithm = algorithm
        self.store = store
        self.ledger = ledger
        self.prompt_bytes = prompt_bytes

    @property
    def adapter_shapes(self) -> Shapes:
        """See `Host.adapter_shapes`."""
        return shapes_of(self.first_adapter)

    @property
    def first_adapter(self) -> Adapter:
        """See `Host.first_adapter`."""
        return self.clients.models.first_adapter

    def visit(
        self, client_id: int, round: int, downlink: bytes, evaluate: bool, beside: Mapping[int, bytes] = NO_OTHERS
    ) -> Reply:
        """Do the client's part of a round, or return the stored reply if the visit was done already.

        Args:
            client_id: The client.
            round: The round.
            downlink: Its message.
            evaluate: Whether it is evaluated.
            beside: Messages of the clients that train together with it. Their visits are done and stored, too; of one
                that fails nothing is, so it is done alone when that client is visited.

        Raises:
            ClientError: The client failed; the message says which, in which round, and why.
        """
        if beside:
            self._visit_together({client_id: downlink, **beside}, round, evaluate)
        done = self.store.reply(client_id, round)
        return done or self._visit(client_id, self.clients[client_id], round, downlink, evaluate)

    def _visit(
        self,
        client_id: int,
        client: Client,
        round: int,
        downlink: bytes,
        evaluate: bool,
        underway: Collection[int] = (),
    ) -> Reply:
        """A visit that is not done yet; rows of other clients that are `underway` are left to their own replies."""
        with self._failures(client_id, round):
            client.restore(self.store.load(client_id, before=round))
            if self.prompt_bytes and self.store.is_new(client_id, before=round):
                # Counted here and not when the host loads: hosts may load often, and a visit happens once.
                with self.ledger.stage("load", round=round, client_id=client_id) as work:
                    work.downlink_bytes = self.prompt_bytes
            uplink = self.algorithm.visit(client, round, downlink)
            evaluation = client.evaluate(round) if evaluate else None
            client.check_finite(evaluation)
            reply = self._reply(client, round, uplink, evaluation, {*underway} - {client_id})
            self.store.save(client.model.state(), reply)
        return reply

    def _visit_together(self, downlinks: Mapping[int, bytes], round: int, evaluate: bool) -> None:
        """Do visits whose clients train together, as far as they are not done, and store what comes of them.

        Raises:
            UserError: What the user must mend.
        """
        from semcons_ray.federation.adapter_model import AdapterModel, Learning, learn_together
        from semcons_ray.federation.together import meet

        underway = {client_id for client_id in downlinks if self.store.reply(client_id, round) is None}
        if len(underway) < 2:
            return

        def visit(client_id: int, learn: Callable[[Learning], None]) -> None:
            client = self.clients[client_id]
            if isinstance(model := client.model, AdapterModel):
                client.learns = lambda pairs, task: learn(Learning(model, pairs, task))
            try:
                self._visit(client_id, client, round, downlinks[client_id], evaluate, underway)
            finally:
                underway.discard(client_id)

        visits = [partial(visit, client_id) for client_id in downlinks if client_id in underway]
        for error in meet(visits, learn_together):
            if isinstance(error, UserError) or not isinstance(error, Exception | None):
                raise error
            if error is not None:
                logger.warning("%s; it is visited again, alone", error)

    def measure(self, client_id: int, round: int, downlink: bytes, examples: Sequence[Example] = ()) -> Reply:
        """Evaluate the model with which the client would start the round after `round`; its stored state is not
        changed.

        For round 0 that is the base model. Where there are `examples`, they alone are scored, and nothing is answered.

        Raises:
            ClientError: The client failed; the message says which, in which round, and why.
        """
        with self._failures(client_id, round):
            client = self._before(client_id, round + 1, downlink)
            evaluation = client.score(round, examples) if examples else client.evaluate(round)
            if round:
                client.check_finite(evaluation)
        return self._reply(client, round, b"", evaluation)

    def export_adapter(self, client_id: int, round: int, downlink: bytes, folder: Path) -> None:
        """Write the adapter with which the client would start `round` to `folder`, in PEFT's format.

        Raises:
            StorageError: The disk is full, or cannot be written to.
        """
        client = self._before(client_id, round, downlink)
        with writing(folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
            client.export(folder)

    def lent(self, client_id: int, files: Files) -> AbstractContextManager[dict[str, bytes]]:
        """See `ClientStore.lent`."""
        return self.store.lent(client_id, files)

    def keep(self, client_id: int, files: Files) -> None:
        """See `Host.keep`."""
        self.store.put(client_id, files)

    def _before(self, client_id: int, round: int, downlink: bytes) -> Client:
        client = self.clients[client_id]
        client.restore(self.store.load(client_id, before=round))
        self.algorithm.adopt(client, round, downlink)
        return client

    def _reply(
        self,
        client: Client,
        round: int,
        uplink: bytes,
        evaluation: Evaluation | None,
        besides: Collection[int] = (),
    ) -> Reply:
        return Reply(
            client_id=client.client_id,
            round=round,
            uplink=uplink,
            train_loss=math.nan if client.train_loss is None else client.train_loss,
            num_private=len(client.private),
            num_pseudo_labels=client.num_pseudo_labels,
            evaluation=evaluation,
            rows=tuple(self.ledger.take(besides)),
        )

    @contextmanager
    def _failures(self, client_id: int, round: int) -> Iterator[None]:
        """Turn whatever goes wrong in the block into a `ClientError`, except errors that the user must mend."""
        try:
            yield
        except NotFiniteError as error:
            raise NotFiniteError(f"client {client_id}, round {round}: {error}") from error
        except Exception as error:
            if isinstance(error, SemconsError) and not isinstance(error, MessageError):
                raise
            logger.error("client %d failed in round %d", client_id, round, exc_info=error)
            raise ClientError(
                f"client {client_id}, round {round}, {self.ledger.worker}: {type(error).__name__}: {error}"
            ) from error
