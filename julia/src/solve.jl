# One solve: from lent memory into lent memory.

"""
A solve, for as long as anybody may ask for its dense output or its adjoint. The solution refers to memory of the
caller's: the first state.
"""
struct Solve{T, F}
    field::F
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
    const call::Ptr{Cvoid}
    const u::Vector{T}
    const margin::Vector{Float64}
    time::Float64
end
Event(field, ::Type{T}) where {T} = Event{T}(field.event, Vector{T}(undef, field.n), zeros(1), NaN)

function (event::Event)(u, t, integrator)
    copyto!(event.u, u)
    call(event.call, event.margin, event.u, t)
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

Base.broadcastable(norm::LargestRMS) = Ref(norm)

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
    solve(field::Union{Field{T}, Source{T}}, alg, request) -> Solve{T}, Outcome

Solve from `u0` at `times[1]` and write the states at all of `times` into `out`.

# Arguments

  - `field`: with an `event`, the solve ends there, and the second state of `out` is that at the event; of the two
    `times` the second then gives the direction only.
  - `request`: a [`Request`](@ref).
"""
function solve(field::Union{Field{T}, Source{T}}, alg, r::Request) where {T}
    times = copy(Vector{Float64}(r.times))
    u0 = Vector{T}(r.u0)
    states = reshape(Vector{T}(r.out), field.n, length(times))
    copyto!(view(states, :, 1), u0)
    direction = times[2] < times[1] ? -1.0 : 1.0
    event = field.event == C_NULL ? nothing : Event(field, T)
    span = event === nothing ? (times[1], times[end]) : (times[1], direction * Inf)
    mass = r.mass.length == 0 ? I : copy(reshape(Vector{T}(r.mass), field.n, field.n))
    problem = ODEProblem(ode_function(field; mass_matrix = mass, full = r.full != 0), u0, span, field.parameters)
    wanted = event === nothing ? times : times[1:1]
    outputs = DiscreteCallback(always, Outputs{T}(wanted, states, 2); save_positions = (false, false))
    callback = if event === nothing
        CallbackSet(outputs)
    else
        CallbackSet(ContinuousCallback(event, Stop(event); save_positions = (false, false)), outputs)
    end
    adaptive = r.fixed == 0 && isadaptive(alg)
    tstops, step = copy(Vector{Float64}(r.stops)), r.first_step
    if !adaptive && step == 0
        append!(tstops, times)
        step = abs(times[end] - times[1])
    end
    dense = r.dense != 0
    integrator = init(
        problem, alg;
        reltol = tolerance(r.rtol), abstol = tolerance(r.atol), adaptive, callback, dense,
        dt = step == 0 ? nothing : direction * step,
        dtmax = direction * min(r.max_step, abs(span[2] - span[1])), dtmin = r.min_step, force_dtmin = r.min_step > 0,
        maxiters = r.max_steps, tstops, d_discontinuities = copy(Vector{Float64}(r.jumps)),
        save_everystep = dense, save_start = dense, save_end = dense, calck = true,
        internalnorm = LargestRMS(copy(Vector{Int64}(r.offsets))), verbose = SILENT,
    )
    sol = solve!(integrator)
    event === nothing || copyto!(view(states, :, 2), integrator.u)
    (; stats, retcode) = sol
    outcome = Outcome(
        code_name(retcode), integrator.t, integrator.dt, event === nothing ? NaN : event.time,
        stats.naccept, stats.nreject, stats.njacs, stats.nw, stats.nnonliniter, stats.nf,
    )
    return Solve{T, typeof(field)}(field, sol), outcome
end

# A symbol's text is never freed.
code_name(retcode) = Base.unsafe_convert(Ptr{UInt8}, Symbol(retcode))

"The state at `m` times, any within the span of a solve that was `dense`, to `out`; both are addresses."
function interpolate!(s::Solve{T}, times::Int64, out::Int64, m::Int64) where {T}
    n = s.field.n
    states = reshape(Vector{T}(Lent(pointer_to(out), m * n)), n, m)
    for (column, t) in zip(eachcol(states), Vector{Float64}(Lent(pointer_to(times), m)))
        s.sol(column, t)
    end
    return nothing
end

"""
    adjoint!(solve, name, alg, request)

The gradient of a loss of the states at `times` with the cotangents `g`, by the adjoint method `name` of
SciMLSensitivity, which must be loaded: with respect to the state at `times[1]` (without `g` there), and to the
parameters. `request` is an [`AdjointRequest`](@ref).
"""
function adjoint! end
