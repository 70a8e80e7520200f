"""
The Julia half of PyJLODE: solves vector fields that lie behind C function pointers with the solvers of
DifferentialEquations.jl, from memory and into memory that belongs to the caller.

Nothing here knows of Python. `PyJLODESciMLSensitivityExt`, loaded with SciMLSensitivity, adds the adjoints.
"""
module PyJLODE

using CommonSolve: init, solve!
using DiffEqBase: DEVerbosity
using LinearAlgebra: BLAS, I, SymTridiagonal, UniformScaling, eigen, ldiv!, lu!, mul!, pinv, svd
using OrdinaryDiffEqCore: OrdinaryDiffEqCore, PIController, default_controller, isadaptive
using PrecompileTools: @compile_workload, @setup_workload
using SciMLBase: CallbackSet, ContinuousCallback, DAEFunction, DAEProblem, DiscreteCallback, FullSpecialize, NoInit,
    ODEFunction, ODEProblem, ReturnCode, SciMLBase, SplitFunction, reinit!, terminate!, u_modified!
using SciMLLogging: SciMLLogging
using SparseArrays: SparseMatrixCSC, nnz, nonzeros

include("memory.jl")
include("products.jl")
include("rhs.jl")
include("compiled.jl")
include("algorithms.jl")
include("checkpoints.jl")
include("split.jl")
include("replay.jl")
include("packs.jl")
include("explicit.jl")
include("alone.jl")
include("solve.jl")
include("dae.jl")
include("abreast.jl")
include("watch.jl")
include("walks.jl")
include("calls.jl")
include("precompile.jl")

end
