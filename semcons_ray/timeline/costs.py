"""What visits cost in a federation: joules of devices and radios, and the CO2 of the electricity."""

from __future__ import annotations

import numpy as np
import pandas as pd

from semcons_ray.timeline.members import Members

JOULES_PER_KWH = 3.6e6

JOULES = ("compute_joules", "radio_joules", "idle_joules")
"""Columns that `with_joules` adds."""


def with_joules(visits: pd.DataFrame, closed_at: pd.Series[float], members: Members) -> pd.DataFrame:
    """Visits with what each takes of its client's battery or socket.

    A device works while it trains and answers. Else it idles while its client is there: it waits for messages, and then
    for the round in which it was asked to end. Who is not asked, or not there, is not counted.

    Args:
        visits: See `clock.COLUMNS`.
        closed_at: When each round ended, by round, in virtual seconds.
        members: The clients.
    """
    busy = visits["fine_tune_seconds"] + visits["generate_seconds"]
    until = np.maximum(closed_at.loc[visits["round"]].to_numpy(), visits["ended_at"])
    idle = (until - visits["began_at"] - busy).clip(lower=0)
    devices, links = members.devices, members.links
    device, link = devices.of_client[visits["client_id"]], links.of_client[visits["client_id"]]
    at_work = np.array([one.joules(1.0) for one in devices.profiles])[device]
    at_rest = np.array([one.joules(0.0, 1.0) for one in devices.profiles])[device]
    up = np.array([one.joules(1.0, 0.0) for one in links.profiles])[link]
    down = np.array([one.joules(0.0, 1.0) for one in links.profiles])[link]
    return visits.assign(
        compute_joules=busy * at_work,
        radio_joules=visits["uplink_bytes"] * up + visits["downlink_bytes"] * down,
        idle_joules=idle * at_rest,
    )
