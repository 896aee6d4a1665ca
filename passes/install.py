"""Hooking the rewrite into Inductor beside whatever passes the user already set. Inductor is imported when it is needed."""

from __future__ import annotations

from rosa_fx.kernels.ops import on_capture


def install() -> None:
    """Add the pass to Inductor's joint passes, behind those that are there. Does nothing if it is there already.

    From then on it is looked for again whenever a rewritten weight is captured: a configuration that was replaced since, or
    `torch.compile(options=...)`, would leave it out.
    """
    from rosa_fx.kernels.inductor import add_joint_pass
    from rosa_fx.passes.inductor_pass import ROSA_PASS

    on_capture(install)
    add_joint_pass(ROSA_PASS)
