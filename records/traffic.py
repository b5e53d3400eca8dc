"""What a training step moves and launches on an H100, counted where there is none.

A micro-batch is traced forward and backward on fake tensors, and Inductor schedules the two graphs for a
device with an H100's properties. No value is computed, no code is generated, no time is measured. Bytes are
Inductor's count of what each kernel reads and writes; caches are ignored, so it is an upper bound.
"""
import contextlib
import copy
import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._dynamo.device_interface import get_interface_for_device
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import train_gpt as tg

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
    warp_size=32, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10, L2_cache_size=50 << 20, uuid="", gcnArchName="",
    is_integrated=0)
GPU = torch.device("cuda", 0)


@dataclasses.dataclass
class Traffic:
    """Of one micro-batch."""
    tokens: int
    graph_breaks: int
    saved: int      # bytes kept for the backward pass
    generated: int  # bytes that Inductor's own kernels move
    extern: int     # bytes that matrix products and attention move
    launches: int   # of Inductor's own kernels


@contextlib.contextmanager
def pretended_h100() -> Iterator[None]:
    """Inductor schedules for an H100; whatever would touch the device is answered here."""
    interface = get_interface_for_device("cuda")
    say = lambda value: staticmethod(lambda *_, **__: value)
    facts = {"is_available": True, "current_device": 0, "get_device_properties": H100,
             "get_device_capability": (9, 0), "get_compute_capability": 90,
             "raise_if_triton_unavailable": None}
    owners = [(owner, name, value) for owner in (torch.cuda, interface, interface.Worker)
              for name, value in facts.items() if hasattr(owner, name)]
    owners += [(module, "has_triton", True) for name, module in list(sys.modules.items())
               if name.startswith("torch.") and hasattr(module, "has_triton")]
    # shapes alone: a build without CUDA can neither copy nor mask there
    no_mask = {torch.ops.aten._unsafe_masked_index_put_accumulate.default: lambda x, *_: torch.empty_like(x)}
    with contextlib.ExitStack() as stack:
        for owner, name, value in owners:
            stack.enter_context(mock.patch.object(owner, name, say(value)))
        stack.enter_context(mock.patch.object(torch.Tensor, "copy_", lambda x, *_: x))
        stack.enter_context(mock.patch.dict(decomposition_table, no_mask))
        yield


def on_gpu(x: object) -> object:
    """A fake tensor's like on the device; anything else as it is."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU) if isinstance(x, Tensor) else x


def trace(hp: tg.Hyperparameters, sequences: int) -> list[tuple[fx.GraphModule, list]]:
    """Forward and backward graphs of a micro-batch under bf16 autocast, with their example inputs."""
    graphs = []

    def keep(graph: fx.GraphModule, examples: list, **_) -> Callable:
        graphs.append((copy.deepcopy(graph), examples))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    counters.clear()
    with torch.device("meta"):
        model = tg.GPT(hp)
    torch.compiler.assume_constant_result(tg.rotary_tables)
    # CUDA's autocast takes norms in float32, the CPU's does not
    norm = lambda x: F.rms_norm(x.float(), (x.size(-1),)).to(x.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(tg, "rms_norm", norm):
        model = model.to_empty(device="cpu").use(tg.KERNELS["flash"](hp.train_seq_len))
        tokens = torch.empty(sequences, hp.train_seq_len, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            backend = functools.partial(compile_fx, inner_compile=keep)
            loss = torch.compile(model, backend=backend, dynamic=False)(tokens, torch.empty_like(tokens))
        loss.backward()
    return graphs


def schedule(graph: fx.GraphModule, examples: list, backward: bool) -> list[tuple[bool, int]]:
    """Inductor's kernels for the graph on the H100: is it a library's, and bytes moved."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [on_gpu(x) for x in examples]
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": GPU}
            if node.op == "get_attr":
                setattr(graph, node.target, on_gpu(getattr(graph, node.target)))
            node.meta.pop("val", None)
    shapes = lambda: FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*inputs)
    context = tracing(TracingContext(mode)), DebugContext(), V.set_fake_mode(mode), torch.no_grad()
    with contextlib.ExitStack() as stack:
        for one in (*context, pretended_h100()):
            stack.enter_context(one)
        shapes()
        view_to_reshape(graph)
        post_grad_passes(graph, is_inference=False)
        shapes()
        record_original_output_strides(graph)
        lowered = GraphLowering(graph, example_inputs=inputs, is_backward=backward)
        with V.set_graph_handler(lowered):
            lowered.run(*inputs)
            lowered._update_scheduler()
            return [(node.is_extern(), 4 * words) for node, words in lowered.count_bytes()[1]]


def saved_bytes(forward: fx.GraphModule) -> int:
    """What it returns beside the loss and is no weight."""
    _, *kept = forward.graph.output_node().args[0]
    return sum(node.meta["val"].nbytes for node in kept
               if node.op != "placeholder" and isinstance(node.meta["val"], Tensor))


def count(hp: tg.Hyperparameters, sequences: int) -> Traffic:
    """The traffic of a micro-batch of sequences (sequences, TRAIN_SEQ_LEN)."""
    graphs = trace(hp, sequences)
    saved, breaks = saved_bytes(graphs[0][0]), sum(counters["graph_break"].values())
    kernels = [kernel for i, graph in enumerate(graphs) for kernel in schedule(*graph, backward=i > 0)]
    return Traffic(sequences * hp.train_seq_len, breaks, saved,
                   sum(moved for extern, moved in kernels if not extern),
                   sum(moved for extern, moved in kernels if extern),
                   sum(moved > 0 for extern, moved in kernels if not extern))
