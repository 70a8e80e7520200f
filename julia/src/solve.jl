# One solve: from borrowed memory into borrowed memory.

"""
A solve, for as long as anybody may ask for its dense output or its adjoint.

`owners` are kept because the solution refers to memory that is theirs.
"""
mutable struct Solve{T}
    const field::Field{T}
    const owners::Vector{Any}
    sol::Any
end

"Writes the states at the output times as the solver passes them."
mutable struct Outputs{T}
    const times::Vector{Float64}
    const out::Matrix{T}
    next::Int
end

always(u, t, integrator) = true

function (o::Outputs)(integrator)
    u_modified!(integrator, false)
    (; t, tdir) = integrator
    while o.next <= length(o.times) && tdir * o.times[o.next] <= tdir * t
        column = view(o.out, :, o.next)
        time = o.times[o.next]
        time == t ? copyto!(column, integrator.u) : integrator(column, time)
        o.next += 1
    end
    return nothing
end

"The margin of an event: positive before it."
mutable struct Event{T}
    const field::Field{T}
    const u::Vector{T}
    const margin::Vector{Float64}
    time::Float64
end
Event(field::Field{T}) where {T} = Event{T}(field, Vector{T}(undef, field.n), zeros(1), NaN)

function (event::Event)(u, t, integrator)
    copyto!(event.u, u)
    call(event.field.event, event.margin, event.u, t)
    return event.margin[1]
end

struct Stop{T}
    event::Event{T}
end

function (stop::Stop)(integrator)
    stop.event.time = integrator.t
    terminate!(integrator)
    return nothing
end

"Largest root mean square among the tensors that a flat state is made of: tensor i is `offsets[i] + 1 : offsets[i + 1]`."
struct LargestRMS
    offsets::Vector{Int}
end

(norm::LargestRMS)(u::Number, t) = abs(u)

function (norm::LargestRMS)(u, t)
    largest = zero(real(float(eltype(u))))
    for (a, b) in zip(norm.offsets, Iterators.drop(norm.offsets, 1))
        total = zero(largest)
        @inbounds @simd for i in (a + 1):b
            total += abs2(u[i])
        end
        rms = sqrt(total / max(b - a, 1))
        isnan(rms) && return rms
        largest = max(largest, rms)
    end
    return largest
end

const SILENT = DEVerbosity(SciMLLogging.None())

"""
    solve(field, alg, u0, times, out, offsets; ...) -> (solve, outcome...)

Solve from `u0` at `times[1]`, write the states at all of `times` into `out` (`n` numbers a time, one time after the
other).

# Arguments

  - `field`: the vector field; with an `event`, the solve ends there and the second state of `out` is that at the event.
  - `u0`, `times`, `out`: [`Borrowed`](@ref).
  - `offsets`: where the tensors of the state lie in it, see [`LargestRMS`](@ref); borrowed Int64.
  - `parameters`: how many parameters the field's `vjp_p` differentiates by.
  - `rtol`, `atol`: numbers, or borrowed vectors.
  - `first_step`: 0 lets the solver choose; with `adaptive = false` the step, and 0 steps from time to time.
  - `stops`, `jumps`: borrowed times that a step ends at, and where the field jumps.
  - `dense`: keep what the dense output and the adjoints need.

# Returns

A [`Solve`](@ref), and `(retcode, t, dt, naccept, nreject, njac, nlu, nnewton, event_time)`; the last is NaN without one.
"""
function solve(
        field::Field{T}, alg, u0::Borrowed{T}, times::Borrowed{Float64}, out::Borrowed{T}, offsets::Borrowed{Int64};
        rtol, atol, parameters::Int = 0, adaptive::Bool = true, first_step::Float64 = 0.0, max_step::Float64 = Inf,
        min_step::Float64 = 0.0, max_steps::Int = 100_000, stops::Borrowed{Float64}, jumps::Borrowed{Float64},
        dense::Bool = false, mass_matrix = nothing,
    ) where {T}
    ts = copy(times.array)
    states = reshape(out.array, field.n, length(ts))
    isempty(states) || copyto!(view(states, :, 1), u0.array)
    direction = length(ts) > 1 && ts[2] < ts[1] ? -1.0 : 1.0
    event = field.event == C_NULL ? nothing : Event(field)
    span = event === nothing ? (ts[1], ts[end]) : (ts[1], direction * Inf)
    mass = mass_matrix === nothing ? I : copy(reshape(mass_matrix.array, field.n, field.n))
    problem = ODEProblem(ode_function(field; mass_matrix = mass), u0.array, span, zeros(T, parameters))
    outputs = DiscreteCallback(
        always, Outputs{T}(event === nothing ? ts : ts[1:1], states, 2); save_positions = (false, false)
    )
    callback = if event === nothing
        CallbackSet(outputs)
    else
        stop = Stop(event)
        CallbackSet(ContinuousCallback(event, stop; save_positions = (false, false)), outputs)
    end
    tstops = copy(stops.array)
    step = first_step
    if !adaptive && step == 0
        append!(tstops, ts)
        step = abs(ts[end] - ts[1])
    end
    integrator = init(
        problem, alg;
        reltol = tolerance(rtol), abstol = tolerance(atol), adaptive, callback, dense,
        dt = step == 0 ? nothing : direction * step,
        dtmax = direction * min(max_step, abs(span[2] - span[1])), dtmin = min_step,
        maxiters = max_steps, tstops, d_discontinuities = copy(jumps.array),
        save_everystep = dense, save_start = dense, save_end = dense, calck = true,
        internalnorm = LargestRMS(copy(offsets.array)), verbose = SILENT,
    )
    sol = solve!(integrator)
    event === nothing || copyto!(view(states, :, 2), integrator.u)
    (; stats, retcode) = sol
    outcome = (
        string(retcode), Float64(integrator.t), Float64(integrator.dt), stats.naccept, stats.nreject, stats.njacs,
        stats.nw, stats.nnonliniter, event === nothing ? NaN : event.time,
    )
    return Solve{T}(field, Any[u0.owner], sol), outcome
end

tolerance(x::Real) = Float64(x)
tolerance(x::Borrowed) = copy(x.array)

"The state at `times`, any within the span of a solve that was `dense`, into `out`."
function interpolate!(s::Solve, times::Borrowed{Float64}, out::Borrowed)
    states = reshape(out.array, s.field.n, length(times.array))
    for (column, t) in zip(eachcol(states), times.array)
        s.sol(column, t)
    end
    return nothing
end

"""
    adjoint!(du0, dp, solve, name, alg, times, g; rtol, atol, max_steps)

The gradient of a loss of the states at `times` with the cotangents `g`, by the adjoint method `name` of
SciMLSensitivity, which must be loaded: with respect to the state at `times[1]` (without `g` there), and to the
parameters.
"""
function adjoint! end
