"""What the gate says when it refuses: what is wrong, the right way beside it, the fix."""

FOREIGN_READ = """{box} was read under a plain JAX transform that records a program (jax.jit, \
jax.lax.scan, jax.eval_shape ...): its present value would be frozen into it as a constant.
    wrong:  jax.jit(lambda x: net(x))(x)
    right:  lamina.jit(lambda x: net(x))(x)     (also lamina.scan, lamina.remat, lamina.infer)
    fix: use lamina's transform, or lamina.functional_call(net, params, x) with all names in \
params; for random draws `with lamina.rng(key):`"""


KEPT_BY_JAX = """{box} is read in a function that JAX may keep from an earlier call, with an old \
value in it: it keeps the programs it records by the identity of the function.
    wrong:  jax.lax.scan(self.cell, h, xs)              jax.checkpoint(self.block)(x)
    right:  jax.lax.scan(lambda h, x: self.cell(h, x), h, xs)
    fix: lamina.scan(self.cell, h, xs) or lamina.remat(self.block)(x), or define the function \
where it is used"""


FOREIGN_WRITE = """{box} is written under a plain JAX transform, which would lose the new value.
    wrong:  jax.jit(f), jax.vmap(f), jax.grad(f), ... where f writes a parameter or buffer
    right:  lamina.jit(f), lamina.vmap(f), lamina.grad(f), ...
    or:     out, state = lamina.functional_call(net, params, x, return_state=True)
    fix: use lamina's transform; or net.eval() if the layer needs no new state, or `with \
lamina.rng(key):` for dropout"""


INNER_WRITE = """{box} is written inside a jax transform nested in lamina's `{kind}`; the new \
value would be lost.
    fix: Use lamina.scan, lamina.vmap, lamina.grad or lamina.remat in place of the jax transform, \
or return the value and write it outside"""


ENDED = """{box} was made or written inside a transform, and exists only there: the transform has \
ended.
    fix: return the value from the transformed function and use what the call returns"""


INFERRING = """{box} is written in infer_shapes under `{kind}`: infer_shapes runs once, and the \
new value would be lost.
    fix: in infer_shapes set shapes and recipes only (self.weight.init = ...), or compute the \
value in forward"""


UNPROVEN = """{box} is reached by `{kind}` on a way that can't be checked again at every call.
    fix: pass it as an argument of the compiled function"""


CALLBACK = """{box} is read in a callback while the compiled function that updates it runs: it \
has no value at this moment.
    fix: pass the value to the callback: jax.debug.callback(f, net.weight.data)"""


LOST = """{name} failed while it was running, after its inputs were given up to it: the \
parameters it was to update are lost. Load them again, for instance from the last checkpoint."""
