"""The message as hand-written Warp and numba kernels: forward, backward, double backward (numba), and with splines."""

from functools import partial
from typing import Any

import numba
import numpy as np
import torch
import warp as wp
from common import C, Graph, Message, N, differentiable, outputs_of_second
from torch import Tensor

BLOCK = 64  # channels of one Warp thread; 8, 16 and 32 are slower on a processor
wp.config.quiet = True
wp.init()
vec = wp.types.vector(length=BLOCK, dtype=wp.float32)
kernel = partial(wp.kernel, enable_backward=False, module="unique")
V2, V3, R3 = wp.array2d(dtype=vec), wp.array3d(dtype=vec), wp.array(dtype=wp.vec3)
F1, I1 = wp.array(dtype=wp.float32), wp.array(dtype=wp.int64)
njit = numba.njit(fastmath=True, error_model="numpy")
ZERO, SIXTH = np.float32(0), np.float32(1 / 6)


# Warp: one thread per receiver and block of channels


@kernel
def warp_forward(phi: V3, v: V3, W: V3, u: R3, pointers: I1, senders: I1, ds: V2, dv: V3):
    i, c = wp.tid()
    s, x, y, z = vec(), vec(), vec(), vec()
    for e in range(int(pointers[i]), int(pointers[i + 1])):
        j = int(senders[e])
        along = wp.cw_mul(phi[j, 1, c], W[e, 1, c])
        scale = wp.cw_mul(phi[j, 2, c], W[e, 2, c])
        s += wp.cw_mul(phi[j, 0, c], W[e, 0, c])
        x += along * u[e][0] + wp.cw_mul(scale, v[j, 0, c])
        y += along * u[e][1] + wp.cw_mul(scale, v[j, 1, c])
        z += along * u[e][2] + wp.cw_mul(scale, v[j, 2, c])
    ds[i, c] = s
    dv[i, 0, c] = x
    dv[i, 1, c] = y
    dv[i, 2, c] = z


@kernel
def warp_spline(phi: V3, v: V3, table: V3, x: F1, u: R3, pointers: I1, senders: I1, ds: V2, dv: V3):
    i, c = wp.tid()
    s, v0, v1, v2 = vec(), vec(), vec(), vec()
    for e in range(int(pointers[i]), int(pointers[i + 1])):
        j, m = int(senders[e]), int(x[e])
        t = x[e] - float(m)
        b0, b3 = (1.0 - t) * (1.0 - t) * (1.0 - t) / 6.0, t * t * t / 6.0
        b1 = (3.0 * t - 6.0) * t * t / 6.0 + 4.0 / 6.0
        b2 = 1.0 - b0 - b1 - b3
        wa = b0 * table[m, 0, c] + b1 * table[m + 1, 0, c] + b2 * table[m + 2, 0, c] + b3 * table[m + 3, 0, c]
        wb = b0 * table[m, 1, c] + b1 * table[m + 1, 1, c] + b2 * table[m + 2, 1, c] + b3 * table[m + 3, 1, c]
        wc = b0 * table[m, 2, c] + b1 * table[m + 1, 2, c] + b2 * table[m + 2, 2, c] + b3 * table[m + 3, 2, c]
        along, scale = wp.cw_mul(phi[j, 1, c], wb), wp.cw_mul(phi[j, 2, c], wc)
        s += wp.cw_mul(phi[j, 0, c], wa)
        v0 += along * u[e][0] + wp.cw_mul(scale, v[j, 0, c])
        v1 += along * u[e][1] + wp.cw_mul(scale, v[j, 1, c])
        v2 += along * u[e][2] + wp.cw_mul(scale, v[j, 2, c])
    ds[i, c] = s
    dv[i, 0, c] = v0
    dv[i, 1, c] = v1
    dv[i, 2, c] = v2


@kernel
def warp_backward(
    phi: V3, v: V3, W: V3, u: R3, gs: V2, gv: V3, pointers: I1, senders: I1, phi_: V3, v_: V3, W_: V3, u_: R3
):
    i, c = wp.tid()
    g, g0, g1, g2 = gs[i, c], gv[i, 0, c], gv[i, 1, c], gv[i, 2, c]
    for e in range(int(pointers[i]), int(pointers[i + 1])):
        j = int(senders[e])
        q = g0 * u[e][0] + g1 * u[e][1] + g2 * u[e][2]
        r = wp.cw_mul(g0, v[j, 0, c]) + wp.cw_mul(g1, v[j, 1, c]) + wp.cw_mul(g2, v[j, 2, c])
        along, scale = wp.cw_mul(phi[j, 1, c], W[e, 1, c]), wp.cw_mul(phi[j, 2, c], W[e, 2, c])
        W_[e, 0, c] = wp.cw_mul(phi[j, 0, c], g)
        W_[e, 1, c] = wp.cw_mul(phi[j, 1, c], q)
        W_[e, 2, c] = wp.cw_mul(phi[j, 2, c], r)
        wp.atomic_add(phi_, j, 0, c, wp.cw_mul(W[e, 0, c], g))
        wp.atomic_add(phi_, j, 1, c, wp.cw_mul(W[e, 1, c], q))
        wp.atomic_add(phi_, j, 2, c, wp.cw_mul(W[e, 2, c], r))
        wp.atomic_add(v_, j, 0, c, wp.cw_mul(scale, g0))
        wp.atomic_add(v_, j, 1, c, wp.cw_mul(scale, g1))
        wp.atomic_add(v_, j, 2, c, wp.cw_mul(scale, g2))
        wp.atomic_add(u_, e, wp.vec3(wp.dot(along, g0), wp.dot(along, g1), wp.dot(along, g2)))


# numba: one pass over the edges, the channel loop inside


@njit
def numba_forward(phi, v, W, u, pointers, senders, ds, dv):
    for i in range(len(pointers) - 1):
        for e in range(pointers[i], pointers[i + 1]):
            j = senders[e]
            u0, u1, u2 = u[e]
            for c in range(C):
                along, scale = phi[j, 1, c] * W[e, 1, c], phi[j, 2, c] * W[e, 2, c]
                ds[i, c] += phi[j, 0, c] * W[e, 0, c]
                dv[i, 0, c] += along * u0 + scale * v[j, 0, c]
                dv[i, 1, c] += along * u1 + scale * v[j, 1, c]
                dv[i, 2, c] += along * u2 + scale * v[j, 2, c]


@njit
def numba_spline(phi, v, table, x, u, pointers, senders, ds, dv):
    w = np.empty((3, C), np.float32)
    for i in range(len(pointers) - 1):
        for e in range(pointers[i], pointers[i + 1]):
            j, m = senders[e], np.int64(x[e])
            u0, u1, u2 = u[e, 0], u[e, 1], u[e, 2]
            t = x[e] - np.float32(m)
            b0, b3 = (SIXTH - t * SIXTH) * (1 - t) * (1 - t), t * t * t * SIXTH
            b1 = (t * SIXTH * 3 - 1) * t * t + 4 * SIXTH
            b2 = 1 - b0 - b1 - b3
            for c in range(C):  # the filter first: in one loop with the message, LLVM vectorises neither
                w[0, c] = (
                    b0 * table[m, 0, c] + b1 * table[m + 1, 0, c] + b2 * table[m + 2, 0, c] + b3 * table[m + 3, 0, c]
                )
                w[1, c] = (
                    b0 * table[m, 1, c] + b1 * table[m + 1, 1, c] + b2 * table[m + 2, 1, c] + b3 * table[m + 3, 1, c]
                )
                w[2, c] = (
                    b0 * table[m, 2, c] + b1 * table[m + 1, 2, c] + b2 * table[m + 2, 2, c] + b3 * table[m + 3, 2, c]
                )
            for c in range(C):
                along, scale = phi[j, 1, c] * w[1, c], phi[j, 2, c] * w[2, c]
                ds[i, c] += phi[j, 0, c] * w[0, c]
                dv[i, 0, c] += along * u0 + scale * v[j, 0, c]
                dv[i, 1, c] += along * u1 + scale * v[j, 1, c]
                dv[i, 2, c] += along * u2 + scale * v[j, 2, c]


@njit
def numba_backward(phi, v, W, u, gs, gv, pointers, senders, phi_, v_, W_, u_):
    for i in range(len(pointers) - 1):
        for e in range(pointers[i], pointers[i + 1]):
            j = senders[e]
            u0, u1, u2 = u[e, 0], u[e, 1], u[e, 2]
            y0 = y1 = y2 = ZERO
            for c in range(C):  # four loops, since LLVM does not vectorise them as one: 10 instead of 16 ms
                g0, g1, g2 = gv[i, 0, c], gv[i, 1, c], gv[i, 2, c]
                W_[e, 0, c] = phi[j, 0, c] * gs[i, c]
                W_[e, 1, c] = phi[j, 1, c] * (g0 * u0 + g1 * u1 + g2 * u2)
                W_[e, 2, c] = phi[j, 2, c] * (g0 * v[j, 0, c] + g1 * v[j, 1, c] + g2 * v[j, 2, c])
            for c in range(C):
                along = phi[j, 1, c] * W[e, 1, c]
                y0 += along * gv[i, 0, c]
                y1 += along * gv[i, 1, c]
                y2 += along * gv[i, 2, c]
            for c in range(C):
                g0, g1, g2 = gv[i, 0, c], gv[i, 1, c], gv[i, 2, c]
                phi_[j, 0, c] += W[e, 0, c] * gs[i, c]
                phi_[j, 1, c] += W[e, 1, c] * (g0 * u0 + g1 * u1 + g2 * u2)
                phi_[j, 2, c] += W[e, 2, c] * (g0 * v[j, 0, c] + g1 * v[j, 1, c] + g2 * v[j, 2, c])
            for c in range(C):
                scale = phi[j, 2, c] * W[e, 2, c]
                for k in range(3):
                    v_[j, k, c] += scale * gv[i, k, c]
            u_[e, 0], u_[e, 1], u_[e, 2] = y0, y1, y2


@njit
def numba_second_u(phi, W, gv, hu, pointers, senders, phi_, W_, gv_):
    for i in range(len(pointers) - 1):
        for e in range(pointers[i], pointers[i + 1]):
            j = senders[e]
            h0, h1, h2 = hu[e, 0], hu[e, 1], hu[e, 2]
            for c in range(C):
                q, along = gv[i, 0, c] * h0 + gv[i, 1, c] * h1 + gv[i, 2, c] * h2, phi[j, 1, c] * W[e, 1, c]
                W_[e, 1, c] = phi[j, 1, c] * q
                phi_[j, 1, c] += W[e, 1, c] * q
                gv_[i, 0, c] += along * h0
                gv_[i, 1, c] += along * h1
                gv_[i, 2, c] += along * h2


@njit
def numba_second(phi, v, W, u, gs, gv, hphi, hv, hW, hu, pointers, senders, phi_, v_, W_, u_, gs_, gv_):
    """The gradient of Σ h · (first gradients), in which every factor of the message appears once more as h."""
    q, hq, r, hr = np.empty((4, C), np.float32)
    for i in range(len(pointers) - 1):
        for e in range(pointers[i], pointers[i + 1]):
            j = senders[e]
            u0, u1, u2, h0, h1, h2 = u[e, 0], u[e, 1], u[e, 2], hu[e, 0], hu[e, 1], hu[e, 2]
            y0 = y1 = y2 = ZERO
            for c in range(C):
                g0, g1, g2 = gv[i, 0, c], gv[i, 1, c], gv[i, 2, c]
                q[c] = g0 * u0 + g1 * u1 + g2 * u2
                hq[c] = g0 * h0 + g1 * h1 + g2 * h2
                r[c] = g0 * v[j, 0, c] + g1 * v[j, 1, c] + g2 * v[j, 2, c]
                hr[c] = g0 * hv[j, 0, c] + g1 * hv[j, 1, c] + g2 * hv[j, 2, c]
            for c in range(C):
                W_[e, 0, c] = hphi[j, 0, c] * gs[i, c]
                W_[e, 1, c] = hphi[j, 1, c] * q[c] + phi[j, 1, c] * hq[c]
                W_[e, 2, c] = hphi[j, 2, c] * r[c] + phi[j, 2, c] * hr[c]
            for c in range(C):
                phi_[j, 0, c] += hW[e, 0, c] * gs[i, c]
                phi_[j, 1, c] += hW[e, 1, c] * q[c] + W[e, 1, c] * hq[c]
                phi_[j, 2, c] += hW[e, 2, c] * r[c] + W[e, 2, c] * hr[c]
            for c in range(C):
                q[c], hq[c] = phi[j, 1, c] * W[e, 1, c], hphi[j, 1, c] * W[e, 1, c] + phi[j, 1, c] * hW[e, 1, c]
                r[c], hr[c] = phi[j, 2, c] * W[e, 2, c], hphi[j, 2, c] * W[e, 2, c] + phi[j, 2, c] * hW[e, 2, c]
            for c in range(C):
                v_[j, 0, c] += hr[c] * gv[i, 0, c]
                v_[j, 1, c] += hr[c] * gv[i, 1, c]
                v_[j, 2, c] += hr[c] * gv[i, 2, c]
            for c in range(C):
                y0 += hq[c] * gv[i, 0, c]
                y1 += hq[c] * gv[i, 1, c]
                y2 += hq[c] * gv[i, 2, c]
            for c in range(C):
                gs_[i, c] += hphi[j, 0, c] * W[e, 0, c] + phi[j, 0, c] * hW[e, 0, c]
                gv_[i, 0, c] += hq[c] * u0 + q[c] * h0 + hr[c] * v[j, 0, c] + r[c] * hv[j, 0, c]
                gv_[i, 1, c] += hq[c] * u1 + q[c] * h1 + hr[c] * v[j, 1, c] + r[c] * hv[j, 1, c]
                gv_[i, 2, c] += hq[c] * u2 + q[c] * h2 + hr[c] * v[j, 2, c] + r[c] * hv[j, 2, c]
            u_[e, 0], u_[e, 1], u_[e, 2] = y0, y1, y2


# As torch functions


def of_warp() -> tuple[Message, Message]:
    def blocks(x: Tensor, rows: int = 3) -> Any:
        return wp.from_torch(x.detach().view(len(x), rows, C // BLOCK, BLOCK), dtype=vec)

    def rows(*arrays: Tensor) -> list[Any]:
        return [blocks(x) for x in arrays]

    def launch(kernel: Any, *arguments: Any) -> None:
        wp.launch(kernel, dim=(N, C // BLOCK), inputs=arguments, device="cpu")

    def edges(graph: Graph) -> list[Any]:
        return [wp.from_torch(graph.pointers), wp.from_torch(graph.senders)]

    def flat(x: Tensor) -> Any:
        return wp.from_torch(x.detach().view(len(x), C // BLOCK, BLOCK), dtype=vec)

    def directions(u: Tensor) -> Any:
        return wp.from_torch(u.detach(), dtype=wp.vec3)

    def forward(phi: Tensor, v: Tensor, W: Tensor, u: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        ds, dv = phi.new_empty(N, C), torch.empty_like(v)
        launch(warp_forward, *rows(phi, v, W), directions(u), *edges(graph), flat(ds), blocks(dv))
        return ds, dv

    def spline(phi: Tensor, v: Tensor, table: Tensor, x: Tensor, u: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        ds, dv = phi.new_empty(N, C), torch.empty_like(v)
        arrays = (*rows(phi, v, table), wp.from_torch(x), directions(u))
        launch(warp_spline, *arrays, *edges(graph), flat(ds), blocks(dv))
        return ds, dv

    def backward(
        phi: Tensor, v: Tensor, W: Tensor, u: Tensor, gs: Tensor, gv: Tensor, graph: Graph
    ) -> tuple[Tensor, ...]:
        phi_, v_, W_, u_ = torch.zeros_like(phi), torch.zeros_like(v), torch.empty_like(W), torch.zeros_like(u)
        arrays = (*rows(phi, v, W), directions(u), flat(gs), blocks(gv), *edges(graph))
        launch(warp_backward, *arrays, *rows(phi_, v_, W_), directions(u_))
        return phi_, v_, W_, u_

    return differentiable(forward, backward, None), spline


def of_numba() -> tuple[Message, Message]:
    def arrays(*tensors: Tensor) -> list[Any]:
        return [x.detach().view(len(x), 3, C).numpy() if x.shape[1] == 3 * C else x.detach().numpy() for x in tensors]

    def edges(graph: Graph) -> list[Any]:
        return [graph.pointers.numpy(), graph.senders.numpy()]

    def forward(phi: Tensor, v: Tensor, W: Tensor, u: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        out = phi.new_zeros(N, C), torch.zeros_like(v)
        numba_forward(*arrays(phi, v, W, u), *edges(graph), *arrays(*out))
        return out

    def spline(phi: Tensor, v: Tensor, table: Tensor, x: Tensor, u: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        out = phi.new_zeros(N, C), torch.zeros_like(v)
        numba_spline(*arrays(phi, v, table), x.numpy(), *arrays(u), *edges(graph), *arrays(*out))
        return out

    def backward(*tensors: Any) -> tuple[Tensor, ...]:
        phi, v, W, u, *above, graph = tensors
        out = torch.zeros_like(phi), torch.zeros_like(v), torch.empty_like(W), torch.empty_like(u)
        numba_backward(*arrays(phi, v, W, u, *above), *edges(graph), *arrays(*out))
        return out

    def second(*tensors: Any) -> list[Any]:
        *tensors, graph = tensors
        out = outputs_of_second(tensors[6] is not None, *tensors[:6])
        if tensors[6] is not None:
            numba_second(*arrays(*tensors), *edges(graph), *arrays(*out))
        else:
            phi, _, W, _, _, gv, _, _, _, hu = tensors
            numba_second_u(*arrays(phi, W, gv, hu), *edges(graph), *arrays(out[0], out[2], out[5]))
        return out

    return differentiable(forward, backward, second), spline
