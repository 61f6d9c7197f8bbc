"""A step of the trainer on the embedded base against one of diffusers' own training script, as it is and with
the one line of ours.

Same pictures, batch and precision. The script's loop runs in a thread of its own that is held where a step
ends, which is where it logs; it loads its pictures in that thread, so that all of its work falls in its own
time. Beside both stands what no trainer can leave out: the UNet's forward and backward pass.

    CUSTOMDIFF_DIFFUSERS_SCRIPT=.../train_custom_diffusion.py pytest benchmarks/bench_trainer.py --benchmark
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench_kv_block import processors, trained, with_processors

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import diffusers_script  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from customdiff import attention, training  # noqa: E402
from customdiff.base import load_base  # noqa: E402
from customdiff.config import TrainConfig  # noqa: E402
from customdiff.views import Pictures  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def held(script: ModuleType, options: list[str]) -> Iterator[Callable[[], None]]:
    """A function that takes one step in the script's loop."""
    turn, done, ended = threading.Semaphore(0), threading.Semaphore(0), []

    class Held(script.Accelerator):
        def log(self, *args, **kwargs):
            done.release()
            turn.acquire()
            if ended:
                raise SystemExit

    def run():
        try:
            script.main(script.parse_args(options))
        except BaseException as error:
            ended.append(error)
        finally:
            done.release()

    def step():
        turn.release()
        done.acquire()
        if ended:
            raise AssertionError("the script has ended") from ended[0]

    script.Accelerator = Held
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    done.acquire()  # its first step
    try:
        yield step
    finally:
        ended.append(None)
        turn.release()
        thread.join()


@contextmanager
def ours(root: Path, batch: int, precision: str) -> Iterator[training.Training]:
    config = TrainConfig(
        images=str(root / "concept"),
        prompts=("photo of a <new1> dog",),
        regularization=str(root / "captioned"),
        batch_size=batch,
        mixed_precision=precision,
    )
    pipeline = load_base(device="cpu")
    with attention.patched(pipeline.unet), training.frozen(pipeline):
        run = training.Training(config, pipeline, Pictures.read(config))
        pipeline.unet.to(DTYPES[precision])  # as train does
        yield run


def unet_alone(pictures: int, precision: str) -> Callable[[], object]:
    dtype = DTYPES[precision]
    unet = with_processors(load_base(device="cpu").unet.to(dtype), processors()["diffusers 2_0"])
    side, channels, width = unet.config.sample_size, unet.config.in_channels, unet.config.cross_attention_dim
    latents = torch.randn(pictures, channels, side, side, dtype=dtype)
    context = torch.randn(pictures, 24, width, dtype=dtype).requires_grad_()
    timesteps, noise = torch.randint(1000, (pictures,)), torch.randn_like(latents)

    def call():
        out = unet(latents, timesteps, encoder_hidden_states=context).sample
        return torch.autograd.grad(torch.nn.functional.mse_loss(out, noise), [context, *trained(unet)])

    return call


@pytest.mark.on("cpu")
@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("precision", list(DTYPES))
def test_trainer(compare, smoke, tmp_path, precision, batch):
    batch = 1 if smoke else batch
    plain = diffusers_script.find(tmp_path)
    if plain is None:
        pytest.skip(diffusers_script.MISSING)
    patched = diffusers_script.with_our_line(plain, tmp_path / "patched.py")
    diffusers_script.write_pictures(tmp_path, regularization=4 * batch)
    more = [f"--train_batch_size={batch}", f"--mixed_precision={precision}", "--max_train_steps=1000000"]
    more += ["--checkpointing_steps=1000000", "--dataloader_num_workers=0", "--noaug"]
    options = diffusers_script.options(tmp_path, tmp_path / "out") + more
    AcceleratorState._reset_state()  # else it would keep the last case's precision
    with ExitStack() as stack:
        scripts = [stack.enter_context(held(diffusers_script.load(p), options)) for p in (plain, patched)]
        run = stack.enter_context(ours(tmp_path, batch, precision))
        cases = {
            "diffusers' script": scripts[0],
            "ours in it (patch_unet)": scripts[1],
            "ours": run.step,
            "UNet alone": unet_alone(2 * batch, precision),
        }
        compare(f"{batch} + {batch} pictures {precision}", cases, baseline="diffusers' script")
