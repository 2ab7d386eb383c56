from collections.abc import Iterable

from semcons_ray.metering.ledger import LedgerRow


def work(rows: Iterable[LedgerRow], *more: str) -> list[tuple[object, ...]]:
    """What was done, when and by whom, without how long it took: a tuple for each row, with `more` of its columns."""
    columns = ("stage", "round", "client_id", "worker", "node", *more)
    return [tuple(getattr(row, column) for column in columns) for row in rows]
