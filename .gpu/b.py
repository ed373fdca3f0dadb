import sys, torch, numpy as np, triton, traceback
from nsa_dist.kernels import ranged, tiled, tuning, NSASpec
from nsa_dist.kernels.packing import Packing

dev = torch.device("cuda")
spec = NSASpec()


def rel(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def views(T):
    pk = Packing(np.array([0, T]), spec)
    t = np.arange(T)
    return (
        pk,
        tiled.window_ranges(pk, t, t, 512, dev),
        tiled.make_ranges(*pk.visible_compressed(t), np.zeros(0, np.int64), dev),
    )


for dt in (torch.bfloat16, torch.float32):
    for dk, dv, H, G in ((192, 128, 16, 1), (128, 128, 8, 2), (96, 64, 6, 6)):
        T = 2500
        pk, w, c = views(T)
        for nm, r, n in (("win", w, T), ("cmp", c, pk.compressed)):
            try:
                torch.manual_seed(1)
                q, k, v, do = [torch.randn(*s, device=dev) for s in ((T, H, dk), (n, G, dk), (n, G, dv), (T, H, dv))]
                gate = torch.rand(T, H, device=dev)
                q, k, v, do = [x.to(dt) for x in (q, k, v, do)]
                Q, K, V, DO = [x.double() for x in (q, k, v, do)]
                o2, l2 = tiled.range_forward(Q, K, V, r, dk**-0.5)
                wt = tiled.range_backward(DO * gate.double()[..., None], Q, K, V, o2, l2, r, dk**-0.5)
                o, lse = ranged.range_forward(q, k, v, r, dk**-0.5)
                d = ranged.row_delta(do, o)
                gt = ranged.range_backward(do, q, k, v, lse, d, gate, r, dk**-0.5)
                g2 = ranged.range_backward(do, q, k, v, lse, d, gate, r, dk**-0.5)
                print(
                    dt,
                    nm,
                    dk,
                    dv,
                    ["%.1e" % rel(a, b) for a, b in zip((o, *gt), (o2, *wt))],
                    all(torch.equal(a, b) for a, b in zip(gt, g2)),
                    flush=True,
                )
            except Exception as e:
                print(dt, nm, dk, dv, "FAIL", repr(e)[:300], flush=True)


def bench(f):
    return triton.testing.do_bench(f, warmup=50, rep=300, return_mode="median")


T = 65536
H, G = 64, 4
for dk, dv in ((192, 128), (128, 128)):
    pk, w, c = views(T)
    torch.manual_seed(0)
    q, do = [torch.randn(T, H, d, device=dev, dtype=torch.bfloat16) for d in (dk, dv)]
    gate = torch.rand(T, H, device=dev)
    for nm, r, n in (("win", w, T), ("cmp", c, pk.compressed)):
        k, v = [torch.randn(n, G, d, device=dev, dtype=torch.bfloat16) for d in (dk, dv)]
        pairs = float((r.hi - r.lo).sum()) * H
        for kern, opts in (
            ("range_forward", ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 4, 2))),
            ("bwd", ((128, 64, 64, 128), (128, 64, 64, 64), (128, 32, 32, 128), (64, 64, 128, 64))),
        ):
            for o in opts:
                try:
                    if kern == "range_forward":
                        tuning._TABLE[("sm_90", kern)] = (o, o)
                        tuning.configuration.cache_clear()
                        t = bench(lambda: ranged.range_forward(q, k, v, r, dk**-0.5))
                        print(
                            nm, dk, dv, kern, o, "%.2f ms %.0f TF" % (t, 2 * (dk + dv) * pairs / t / 1e9), flush=True
                        )
                    else:
                        tuning._TABLE[("sm_90", "range_dq")] = ((o[0], o[1], 8, 2),) * 2
                        tuning._TABLE[("sm_90", "range_dkv")] = ((o[2], o[3], 8, 2),) * 2
                        tuning.configuration.cache_clear()
                        tuning._TABLE[("sm_90", "range_forward")] = ((128, 64, 8, 2),) * 2
                        oo, lse = ranged.range_forward(q, k, v, r, dk**-0.5)
                        d = ranged.row_delta(do, oo)
                        import torch.profiler as P

                        f = lambda: ranged.range_backward(do, q, k, v, lse, d, gate, r, dk**-0.5)
                        t = bench(f)
                        with P.profile(activities=[P.ProfilerActivity.CUDA]) as pr:
                            f()
                            torch.cuda.synchronize()
                        parts = {
                            e.key[:22]: round(e.device_time_total / 1e3, 2)
                            for e in pr.key_averages()
                            if e.device_time_total > 300
                        }
                        print(
                            nm,
                            dk,
                            dv,
                            "bwd dq,dkv",
                            o,
                            "%.2f ms %.0f TF(alg)" % (t, 2 * (3 * dk + 2 * dv) * pairs / t / 1e9),
                            parts,
                            flush=True,
                        )
                except Exception as e:
                    print(nm, dk, dv, kern, o, "FAIL", repr(e)[:160], flush=True)
