import time
from pathlib import Path
import torch, torch.distributed as dist
from tests.distributed.job_helpers import *

def f(folder):
    t=time.time(); out={}
    root=Path(folder)
    if dist.get_rank()==0: make_folders(root)
    dist.barrier(); out["folders"]=time.time()-t; t=time.time()
    args=parse_job(root,*"--rollout-batch-size 32 --global-batch-size 16 --micro-batch-size 2 --train-iters 4 --lr 1e-3".split())
    out["parse"]=time.time()-t; t=time.time()
    from megatron_rlhfuse.assembly import build_trained_models, start_megatron
    from megatron_rlhfuse.observe.trace import Tracer
    from megatron_rlhfuse.training.ppo import PPO, advantage_options
    from megatron_rlhfuse.training.experience import build_experience
    start_megatron(); out["start"]=time.time()-t; t=time.time()
    for case in [(1,1,1,1),(1,2,2,1),(2,2,1,4),(2,1,1,2)]:
        a=changed(args,tensor_model_parallel_size=case[0],pipeline_model_parallel_size=case[1],critic_tensor_model_parallel_size=case[2],critic_pipeline_model_parallel_size=case[3])
        m=build_trained_models(a); out[f"build{case}"]=time.time()-t; t=time.time()
        ppo=PPO(a,m,Tracer(root,dist.get_rank(),False))
        exp=build_experience([make_scored(i,i) for i in range(32)],advantage_options(a),0.1,0)
        u=ppo.update(1,exp,0.1)
        out[f"upd{case}"]=time.time()-t; t=time.time()
        out[f"m{case}"]=[s.grad_norm for s in u.actor+u.critic]
    return out

def test_x(run_ranks,tmp_path):
    for r in run_ranks(f,4,str(tmp_path))[:1]: print(*r.items(),sep="\n")
