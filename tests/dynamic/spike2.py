from pathlib import Path
import torch
def work(groups, layout, family):
    from megatron_prism.core.config import GangConfig, ParallelConfig
    from megatron_prism.checkpoint import folder, sharded
    from megatron_prism.models import build
    from megatron_prism.generate.cached import Cached
    from megatron_prism.generate.mcore import MCore
    from megatron_prism.generate.engine import Sampling, seed_of
    from tests.dynamic import standin
    torch.set_num_threads(1)
    root=Path("/tmp/spike_models")
    gang = GangConfig(parallel=ParallelConfig(**layout), precision="fp32", seed=0)
    model = folder.read(root/family/"ckpt").model
    chunks = build.build(model, groups, gang); sharded.load_weights(root/family/"ckpt", chunks)
    gen = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3,300,(n,),generator=gen).tolist() for n in (75,36,23,2,18,5,33)]
    s = Sampling(max_tokens=24, temperature=.8, end_ids=(7,11,90,200))
    seeds=[seed_of(1,i) for i in range(len(prompts))]
    a = Cached(chunks, model, groups, num_rows=6, max_context=256).generate(prompts,2,s,seeds)
    with standin.installed():
        b = MCore(chunks, model, groups, max_context=256, cache_bytes=10**9, page_tokens=16, num_rows=5).generate(prompts,2,s,seeds)
    same = [x.token_ids==y.token_ids for x,y in zip(a,b)]
    err = max(abs(p-q) for x,y in zip(a,b) for p,q in zip(x.logprobs,y.logprobs))
    return [all(same), sum(same), err]
