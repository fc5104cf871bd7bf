"""`packlight bench transport`: how fast each KV transport ships, what it costs, and how much of it prefill hides."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

from packlight.bench.micro.flags import add_thread_argument, at_least_one, num_threads, one_of
from packlight.bench.micro.model import add_model_arguments, config_of, open_configured
from packlight.bench.output import add_output_arguments, check_output, emit, machine_facts, machine_line, say, table
from packlight.bench.timing import Spread
from packlight.core.config import Config
from packlight.core.types import ModelSpec

if TYPE_CHECKING:
    from packlight.bench.micro.measure.receiver import Shipment
    from packlight.bench.micro.measure.transport import Question

SUMMARY = "GB/s and CPU seconds of every KV transport, and the share of shipping that prefill hides"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=int, default=7000, metavar="N", help="length of the prompt")
    parser.add_argument("--transports", metavar="A,B", help="which to measure (all)")
    parser.add_argument("--recipe", default="none", metavar="A@8", help="packed by this recipe, ratio 1/8")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds")
    parser.add_argument("--hidden", action="store_true", help="also ship prompts that are really prefilled meanwhile")
    parser.add_argument("--hidden-rounds", type=int, default=2, metavar="N", help="whole prefills of each transport")
    add_thread_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Starts worker processes of its own. Raises StartupError for wrong flags, and for workers that do not start."""
    check_output(arguments.json)
    for flag in ("tokens", "rounds", "hidden-rounds"):
        at_least_one(flag, getattr(arguments, flag.replace("-", "_")))
    # Takes seconds: torch.
    from packlight.bench.micro.measure.transport import ONE_PROCESS, time_hiding, time_shipping
    from packlight.transfer.registry import TRANSPORTS

    wanted = arguments.transports.split(",") if arguments.transports else TRANSPORTS
    names = tuple(one_of("transports", name, TRANSPORTS) for name in wanted)
    config = config_of(arguments)
    spec = open_configured(config).spec
    question = make_question(arguments, config, spec)
    shipped, skipped = asyncio.run(time_shipping(question, names, arguments.rounds, say))
    hidden: dict[str, list[Shipment]] = {}
    if arguments.hidden:
        crossing = tuple(name for name in shipped if name != ONE_PROCESS)
        hidden = asyncio.run(time_hiding(question, crossing, arguments.hidden_rounds, say))
    report = {
        "bench": "transport",
        "model": spec.name,
        "tokens": arguments.tokens,
        "recipe": arguments.recipe,
        "rounds": arguments.rounds,
        "prefill_threads": question.num_threads,
        "transports": {name: make_entry(each, hidden.get(name, [])) for name, each in shipped.items()},
        "skipped": skipped,
        "machine": machine_facts(),
    }
    emit(report, _lines(report), arguments.json)
    return 0


def make_question(arguments: argparse.Namespace, config: Config, spec: ModelSpec) -> Question:
    """The pools have room for the prompt, and for the anew computed ones of `--hidden`."""
    from packlight.bench.micro.measure.packing import parse_pack
    from packlight.bench.micro.measure.transport import Question

    page_size, itemsize = config.kv.page_size, 4 if spec.dtype == "float32" else 2
    num_bytes = 3 * (arguments.tokens + 2 * page_size) * spec.kv_bytes_per_token(itemsize)
    memory = f"prefill.kv_memory_bytes={max(num_bytes, 1 << 16)}"
    return Question(
        settings=(f"model.path={arguments.model}", *arguments.set, memory),
        spec=spec,
        num_tokens=arguments.tokens,
        pack=parse_pack("recipe", arguments.recipe, spec),
        num_threads=num_threads(arguments),
    )


def make_entry(shipped: list[Shipment], hidden: list[Shipment]) -> dict[str, Any]:
    """`hidden_share` is 1 - (what a real shipment took after its prefill) / (what sending the same bytes takes when
    nothing is computed), medians of both; 0 when nothing is hidden."""
    entry = {
        "shipped_bytes": shipped[0].shipped_bytes,
        "ready_ms": _spread([1000 * each.ready_s for each in shipped]),
        "gbs": _spread([each.gbs for each in shipped]),
        "cpu_s_per_gib": _spread([each.cpu_s_per_gib for each in shipped]),
        "pack_ms": _spread([1000 * each.timings.select_s for each in shipped]),
    }
    if hidden:
        exposed_s = Spread(tuple(each.exposed_s for each in hidden))
        sending_s = Spread(tuple(each.sending_s for each in shipped))
        entry["hidden"] = {
            "hidden_share": max(0.0, 1 - exposed_s.median / sending_s.median),
            "exposed_ms": exposed_s.times(1000).as_json(),
            "sending_ms": sending_s.times(1000).as_json(),
            "ready_ms": _spread([1000 * each.ready_s for each in hidden]),
            "prefill_ms": _spread([1000 * each.timings.prefill_s for each in hidden]),
            "pack_ms": _spread([1000 * each.timings.select_s for each in hidden]),
        }
    return entry


def _spread(values: list[float]) -> dict[str, float]:
    return Spread(tuple(values)).as_json()


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['model']}, {report['tokens']} tokens, {report['recipe']}: {machine_line(report['machine'])}",
        "",
    ]
    rows = [_row(name, entry) for name, entry in report["transports"].items()]
    header = ("transport", "MB", "ms", "GB/s", "min", "max", "CPU s/GiB", "pack ms", "exposed ms", "hidden")
    lines += table(header, rows)
    return lines + [f"skipped: {name}: {reason}" for name, reason in report["skipped"].items()]


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    hidden = entry.get("hidden")
    return (
        name,
        f"{entry['shipped_bytes'] / 1e6:.1f}",
        f"{entry['ready_ms']['median']:.0f}",
        *(f"{entry['gbs'][key]:.2f}" for key in ("median", "min", "max")),
        f"{entry['cpu_s_per_gib']['median']:.2f}",
        f"{entry['pack_ms']['median']:.0f}",
        f"{hidden['exposed_ms']['median']:.0f}" if hidden else "-",
        f"{hidden['hidden_share']:.0%}" if hidden else "-",
    )
