"""Inference engines for CPUs that pip brings: each the plain U-Net, exported, on PyTorch's threads.

    pip install -r requirements/peers.txt

What is timed is inference alone: an engine's input is in place, its output is read back for the
gate only.
"""

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .contest import Contender

# What has to be importable, by contender.
MODULES = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "ncnn": ("ncnn", "pnnx"),
    "mnn": ("MNN", "onnx", "onnxscript"),
}


def missing() -> dict[str, str]:
    """The peers that cannot be measured here, and why."""
    absent = {
        name: [module for module in modules if importlib.util.find_spec(module) is None]
        for name, modules in MODULES.items()
    }
    return {name: f"no module {', '.join(those)}" for name, those in absent.items() if those}


def make(name: str, model: nn.Module, image: Tensor) -> Contender:
    """A peer's inference of ``model``, in evaluation mode and fp32, on images like ``image``."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), quiet():
        run, read = PEERS[name](model, image.contiguous(), Path(folder))

    def run_and_read() -> list[Tensor]:
        run()
        return [torch.from_numpy(read()).reshape(len(image), -1, *image.shape[2:])]

    return Contender(run_and_read, timed=run)


Peer = tuple[Callable[[], object], Callable[[], np.ndarray]]  # inference; its output


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk a lot."""
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(nowhere))
        yield


def command(*arguments: object) -> None:
    ran = subprocess.run([*map(str, arguments)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{arguments[0]} failed: {(ran.stderr or ran.stdout)[-500:]}")


def exported(model: nn.Module, image: Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(model, (image,), str(path), dynamo=True, external_data=False, verbose=False)
    return path


def onnxruntime(model: nn.Module, image: Tensor, folder: Path) -> Peer:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = str(exported(model, image, folder))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, image.numpy())
    binding.bind_output(session.get_outputs()[0].name)
    return (
        lambda: session.run_with_iobinding(binding),
        lambda: binding.copy_outputs_to_cpu()[0],
    )


def openvino(model: nn.Module, image: Tensor, folder: Path) -> Peer:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = ov.Core()
    compiled = core.compile_model(core.read_model(exported(model, image, folder)), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(image.numpy(), shared_memory=True))
    return request.infer, lambda: request.get_output_tensor(0).data


def ncnn(model: nn.Module, image: Tensor, folder: Path) -> Peer:
    import ncnn as engine
    import pnnx

    torch.jit.trace(model, image).save(str(folder / "model.pt"))
    shape = f"inputshape=[{','.join(map(str, image.shape))}]"
    command(Path(pnnx.EXEC_PATH), folder / "model.pt", shape, "fp16=0")
    net = engine.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    net.load_param(str(folder / "model.ncnn.param"))
    net.load_model(str(folder / "model.ncnn.bin"))
    (sample,) = image  # it knows no batches
    mat = engine.Mat(sample.numpy()).clone()
    output: list[object] = []

    def run() -> None:
        extractor = net.create_extractor()
        extractor.input("in0", mat)
        output[:] = [extractor.extract("out0")[1]]

    return run, lambda: np.array(output[0])


def mnn(model: nn.Module, image: Tensor, folder: Path) -> Peer:
    import MNN

    path = folder / "model.mnn"
    # Not by its own command, which first installs a package that reports its use.
    convert = "import sys, MNN, _tools; _tools.mnnconvert(sys.argv)"
    command(
        *(sys.executable, "-c", convert, "-f", "ONNX", "--bizCode", "fastunet"),
        *("--modelFile", exported(model, image, folder), "--MNNModel", path),
    )
    interpreter = MNN.Interpreter(str(path))
    threads = torch.get_num_threads()
    session = interpreter.createSession(
        {"numThread": threads, "backend": "CPU", "precision": "high"}
    )

    def host(values: np.ndarray) -> object:
        layout = MNN.Tensor_DimensionType_Caffe
        return MNN.Tensor(values.shape, MNN.Halide_Type_Float, values, layout)

    interpreter.getSessionInput(session).copyFrom(host(image.numpy()))
    output = interpreter.getSessionOutput(session)
    shape = output.getShape()

    def read() -> np.ndarray:
        values = host(np.zeros(shape, np.float32))
        output.copyToHostTensor(values)
        return np.array(values.getData(), np.float32).reshape(shape)

    return lambda: interpreter.runSession(session), read


PEERS: dict[str, Callable[[nn.Module, Tensor, Path], Peer]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ncnn": ncnn,
    "mnn": mnn,
}
