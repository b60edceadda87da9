"""One moment of a serving environment as text or as a picture: replicas over their devices, queues,
KV use, routing, the switch, and what the last interval came to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from engine.cluster import ClusterSnapshot, ClusterSpec, Replica, ReplicaStats
from envs.traffic_feed import IntervalCounts

Color = tuple[int, int, int]
BAR_CELLS = 20
WAITING_SCALE = 20  # waiting requests that fill at least half of a bar

MARGIN, GAP, WIDTH = 20, 6, 1040
HEAD, BOX, FOOT = 92, 250, 40  # pixels of the title, the replicas and the legend
MIN_SLOT, MAX_SLOT = 44, 250  # pixels per device
PAPER, INK, FAINT, RULE = (250, 250, 248), (32, 36, 40), (120, 126, 132), (214, 216, 218)
RUNNING, WAITING, CACHE, SHARE = (56, 118, 176), (222, 132, 38), (66, 148, 104), (136, 98, 168)
ALERT, SWITCHING = (196, 62, 54), (178, 132, 12)
BOXES: tuple[Color, ...] = ((226, 236, 246), (232, 242, 232), (248, 238, 224), (240, 232, 246))


@dataclass(frozen=True, slots=True)
class Frame:
    """What is shown. `reward` and `counts` are those of the interval before the snapshot."""

    snapshot: ClusterSnapshot
    spec: ClusterSpec
    counts: IntervalCounts
    interval_s: float
    start_s: float  # of the episode, on the cluster's clock
    reward: float

    @property
    def title(self) -> str:
        at_s, snapshot = self.snapshot.now_s - self.start_s, self.snapshot
        return f"t = {at_s:.0f} s   {snapshot.deployment.key}   epoch {snapshot.epoch}"

    @property
    def rates(self) -> str:
        counts, seconds = self.counts, self.interval_s
        return (
            f"arrived {counts.arrived / seconds:.2f}/s   finished {counts.finished / seconds:.2f}/s"
            f"   goodput {counts.met / seconds:.2f}/s   rejected {counts.rejected}"
            f"   held back {self.snapshot.num_queued_unrouted}   reward {self.reward:+.3f}"
        )

    @property
    def switch(self) -> str:
        ticket = self.snapshot.switch
        if ticket is None:
            return "no switch yet"
        line = f"{ticket.ticket_id}: {ticket.from_key} to {ticket.to_key}, {ticket.phase.value}"
        return f"{line}, {ticket.duration_s:.1f} s" + (
            f", {ticket.reason}" if ticket.reason else ""
        )


@dataclass(frozen=True, slots=True)
class _Load:
    """One replica: counts, and shares in [0, 1] that bars show."""

    replica: Replica
    num_running: int
    num_waiting: int
    running: float
    waiting: float
    cache: float
    routed: float | None  # mean share over workload types; None: routed by load
    alive: bool


def _loads(frame: Frame) -> list[_Load]:
    """Of the replicas, by their first device."""
    snapshot, limit = frame.snapshot, frame.spec.max_num_seqs
    by_id = {stats.replica_id: stats for stats in snapshot.replicas}
    most = max([WAITING_SCALE, *(s.num_waiting for s in snapshot.replicas)])
    shares = np.array(snapshot.routing.weights)
    routed = dict(
        zip(snapshot.routing.replica_ids, shares.mean(axis=0), strict=True) if len(shares) else ()
    )
    found = []
    for replica in sorted(snapshot.deployment.replicas, key=lambda r: min(r.placement.devices)):
        nothing = ReplicaStats(replica.replica_id, 0.0, 0, 0, 0, 0, 1, 0, 0, 0, alive=False)
        stats = by_id.get(replica.replica_id, nothing)
        share = routed.get(replica.replica_id)
        found.append(
            _Load(
                replica,
                stats.num_running,
                stats.num_waiting,
                min(stats.num_running / limit, 1.0),
                stats.num_waiting / most,
                stats.kv_blocks_used / max(stats.kv_blocks_total, 1),
                None if share is None else float(share),
                stats.alive,
            )
        )
    return found


# --------------------------------------------------------------------------------------
# Text


def _bar(share: float) -> str:
    full = round(min(max(share, 0.0), 1.0) * BAR_CELLS)
    return "#" * full + "." * (BAR_CELLS - full)


def show_text(frame: Frame) -> str:
    """Lines for a terminal."""
    lines = [frame.title, frame.rates, f"switch  {frame.switch}"]
    for load in _loads(frame):
        devices = ",".join(map(str, load.replica.placement.devices))
        routed = "by load" if load.routed is None else f"{100 * load.routed:.0f} %"
        lines += [
            f"replica {load.replica.replica_id} {load.replica.parallel.key} on devices {devices}, "
            f"routed {routed}" + ("" if load.alive else "   NOT ALIVE"),
            f"  running {load.num_running:>5} {_bar(load.running)}",
            f"  waiting {load.num_waiting:>5} {_bar(load.waiting)}",
            f"  KV use  {100 * load.cache:>4.0f}% {_bar(load.cache)}",
        ]
    if frame.snapshot.dead_devices:
        lines.append(f"dead devices: {', '.join(map(str, frame.snapshot.dead_devices))}")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------
# Picture


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw(frame: Frame) -> NDArray[np.uint8]:
    """[height, width, 3]; the size depends on the number of devices alone."""
    devices = frame.spec.num_devices
    slot = max(MIN_SLOT, min(MAX_SLOT, (WIDTH - 2 * MARGIN) // devices))
    width = max(WIDTH, slot * devices + 2 * MARGIN)
    image = Image.new("RGB", (width, HEAD + BOX + FOOT), PAPER)
    pen = ImageDraw.Draw(image)
    _draw_head(pen, frame, width)
    left = (width - slot * devices) // 2
    for number, load in enumerate(_loads(frame)):
        right = left + slot * load.replica.parallel.num_devices
        _draw_replica(pen, load, frame, (left + GAP // 2, right - GAP // 2), BOXES[number % 4])
        left = right
    idle = sorted(set(range(devices)) - frame.snapshot.deployment.devices)
    for device in idle:
        _draw_device(pen, device, frame, (left + GAP // 2, left + slot - GAP // 2), HEAD + 34)
        left += slot
    _draw_legend(pen, width)
    return np.asarray(image).copy()


def _draw_head(pen: ImageDraw.ImageDraw, frame: Frame, width: int) -> None:
    pen.text((MARGIN, 10), frame.title, INK, _font(20))
    pen.text((MARGIN, 38), frame.rates, INK, _font(15))
    color = SWITCHING if frame.snapshot.switch_in_flight else FAINT
    pen.text((MARGIN, 61), frame.switch, color, _font(15))
    pen.line((MARGIN, HEAD - 6, width - MARGIN, HEAD - 6), RULE)


def _draw_replica(
    pen: ImageDraw.ImageDraw, load: _Load, frame: Frame, span: tuple[int, int], fill: Color
) -> None:
    left, right = span
    top, bottom = HEAD, HEAD + BOX
    edge = RULE if load.alive else ALERT
    pen.rounded_rectangle((left, top, right, bottom), 6, fill, edge, 1 if load.alive else 3)
    name = load.replica.parallel.key
    wide = right - left > 110
    pen.text(
        (left + 8, top + 7),
        f"r{load.replica.replica_id}  {name}" if wide else name,
        INK,
        _font(15 if wide else 11),
    )
    devices = load.replica.placement.devices
    slot = (right - left - 12) / len(devices)
    for i, device in enumerate(devices):
        cell = (round(left + 6 + i * slot) + 1, round(left + 6 + (i + 1) * slot) - 1)
        _draw_device(pen, device, frame, cell, top + 34)
    bars = (
        ("running", str(load.num_running), load.running, RUNNING),
        ("waiting", str(load.num_waiting), load.waiting, WAITING),
        ("KV", f"{100 * load.cache:.0f} %", load.cache, CACHE),
        ("routed", _routed(load, wide), load.routed or 0.0, SHARE),
    )
    for row, (label, value, share, color) in enumerate(bars):
        _draw_bar(pen, (left + 8, right - 8, top + 74 + 43 * row), label, value, share, color)


def _routed(load: _Load, wide: bool) -> str:
    if load.routed is not None:
        return f"{100 * load.routed:.0f} %"
    return "by load" if wide else "load"


def _draw_bar(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int, int],
    label: str,
    value: str,
    share: float,
    color: Color,
) -> None:
    left, right, top = place
    if right - left > 90:
        pen.text((left, top), label, FAINT, _font(13))
    pen.text((right, top), value, INK, _font(13), anchor="ra")
    pen.rectangle((left, top + 19, right, top + 31), (255, 255, 255), RULE)
    filled = round((right - left - 2) * min(max(share, 0.0), 1.0))
    if filled:
        pen.rectangle((left + 1, top + 20, left + filled, top + 30), color)


def _draw_device(
    pen: ImageDraw.ImageDraw, device: int, frame: Frame, span: tuple[int, int], top: int
) -> None:
    dead = device in frame.snapshot.dead_devices
    left, right = span
    color = ALERT if dead else PAPER
    pen.rectangle((left, top, right, top + 26), color, FAINT)
    middle = ((left + right) // 2, top + 13)
    pen.text(middle, str(device), PAPER if dead else INK, _font(14), anchor="mm")


def _draw_legend(pen: ImageDraw.ImageDraw, width: int) -> None:
    at, top = MARGIN, HEAD + BOX + 12
    for label, color in (
        ("running, of the batch limit", RUNNING),
        ("waiting", WAITING),
        ("KV blocks in use", CACHE),
        ("routing weight, mean over types", SHARE),
        ("dead", ALERT),
    ):
        pen.rectangle((at, top + 2, at + 11, top + 13), color)
        pen.text((at + 17, top), label, FAINT, _font(13))
        at += 17 + round(pen.textlength(label, _font(13))) + 22
    pen.text((width - MARGIN, top), "numbered cells: devices", FAINT, _font(13), anchor="ra")
