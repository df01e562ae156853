"""Your own classes, in any form you like. `adapters.py` beside this file can import them:

from my_gpt2 import MyNorm

def layer_norm(x, weight, bias, eps):
    norm = MyNorm(len(weight), eps).to(x.dtype)
    norm.load_state_dict({"gain": weight, "shift": bias})
    return norm(x)
"""
