# The sweep of benchmarks/batch.py by the kernels of DiffEqGPU.jl on the CPU, which are not used by PyJLODE: trajectories a
# second, in the processor's time, the best of five, of 10,000 Lorenz systems to t = 5, rtol = atol = 1e-6.
#
#     julia --project=PROJECT benchmarks/kernels.jl
#
# The project has DiffEqGPU, KernelAbstractions, SciMLBase and StaticArrays.

using DiffEqGPU, SciMLBase, StaticArrays

lorenz(u, p, t) = SVector(10 * (u[2] - u[1]), u[1] * (p[1] - u[3]) - u[2], u[1] * u[2] - 8 / 3 * u[3])
const PROBLEM = ODEProblem{false}(lorenz, SVector(1.0, 1.0, 1.0), (0.0, 5.0), SVector(28.0))
const SYSTEMS = [DiffEqGPU.make_prob_compatible(remake(PROBLEM; p = SVector(rho))) for rho in range(0.0, 28.0; length = 10_000)]

function seconds()
    start = ccall(:clock, Clong, ())
    DiffEqGPU.vectorized_asolve(SYSTEMS, PROBLEM, GPUTsit5(); dt = 0.01, abstol = 1.0e-6, reltol = 1.0e-6, save_everystep = false)
    return (ccall(:clock, Clong, ()) - start) / 1.0e6
end

seconds()
println("GPUTsit5 on the CPU: ", round(Int, length(SYSTEMS) / minimum(_ -> seconds(), 1:5)), " trajectories a second")
