# One solve: from lent memory into lent memory.

"""
A solve, for as long as anybody may ask for its dense output or its adjoint. The solution refers to memory of the
caller's: the first state. The `steps` are there where they were to be kept.
"""
struct Solve{T, F}
    field::F
    sol::Any
    steps::Union{Nothing, Steps, Trail{T}}
end

replay!(s::Solve, r::ReplayRequest; whole = false) = replay!(s.steps, s.field, r; whole)

"Nobody needs its steps any more."
recycle!(s::Solve) = s.steps isa Trail ? recycle!(s.steps, s.field) : nothing

"""
Writes the states at the output times as the solver passes them: at time `k` of system `i` to `out[:, i, k]`; and
notes each step, where that is asked for.
"""
mutable struct Outputs{T, A <: AbstractArray{T, 3}, S}
    const times::Vector{Float64}
    const out::A
    system::Int
    next::Int
    steps::Union{Nothing, S}
end

function Outputs(times, out::A, system, next, steps, ::Type{V}) where {T, A <: AbstractArray{T, 3}, V <: AbstractVector{T}}
    return Outputs{T, A, steps_type(V)}(times, out, system, next, steps)
end

"Its steps from the first state on, if a request has them kept."
function first_step(r::Request, u0::V) where {V}
    r.keep == 0 && return nothing
    steps = steps_type(V)(r.keep == 2 ? Checkpoints{V}() : nothing)
    note!(steps, u0, Vector{Float64}(r.times)[1])
    return steps
end

due(o::Outputs, t, tdir) = o.next <= length(o.times) && tdir * o.times[o.next] <= tdir * t

"Whether the solver has passed an output time that is not written."
struct Due{O <: Outputs}
    outputs::O
end

function (d::Due)(u, t, integrator)
    note!(d.outputs.steps, u, t)  # here, where the solver comes by after each accepted step
    return due(d.outputs, t, integrator.tdir)
end

function (o::Outputs)(integrator)
    u_modified!(integrator, false)
    (; t, tdir) = integrator
    while due(o, t, tdir)
        column = view(o.out, :, o.system, o.next)
        time = o.times[o.next]
        time == t ? copyto!(column, integrator.u) : integrator(column, time)
        o.next += 1
    end
    return nothing
end

"The margin of an event: positive before it."
mutable struct Event{V}
    const call::Ptr{Cvoid}
    const u::V
    const margin::Vector{Float64}
    time::Float64
end
Event(field, u0) = Event(field.event, similar(u0), zeros(1), NaN)

function (event::Event)(u, t, integrator)
    copyto!(event.u, u)
    call(event.call, event.margin, event.u, t)
    return event.margin[1]
end

struct Stop{E <: Event}
    event::E
end

function (stop::Stop)(integrator)
    stop.event.time = integrator.t
    terminate!(integrator)
    u_modified!(integrator, false)
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
    for k in 2:length(norm.offsets)
        a, b = norm.offsets[k - 1], norm.offsets[k]
        rms = sqrt(squares(u, a + 1, b) / max(b - a, 1))
        isnan(rms) && return rms
        largest = max(largest, rms)
    end
    return largest
end

"The sum of the squares of u[a:b]."
function squares(u::Array, a, b)
    total = zero(real(float(eltype(u))))
    @inbounds @simd for i in a:b
        total += abs2(u[i])
    end
    return total
end
squares(u, a, b) = b < a ? zero(real(float(eltype(u)))) : sum(abs2, view(vec(u), a:b))

const SILENT = DEVerbosity(SciMLLogging.None())

"""
    solve(field::Union{Field{T}, Source{T}}, alg, request) -> Solve{T}, Outcome

Solve from `u0` at `times[1]` and write the states at all of `times` into `out`.

# Arguments

  - `field`: with an `event`, the solve ends there, and the second state of `out` is that at the event; of the two
    `times` the second then gives the direction only.
  - `request`: a [`Request`](@ref).
"""
function solve(field::Union{Field{T}, Parts{T}, Source{T}}, alg, r::Request) where {T}
    if is_alone(field, r)
        alone = Alone(field, r)
        kept, outcome = again!(alone, r.u0.address, r.out.address)
        return kept === nothing ? Solve{T, typeof(field)}(field, nothing, nothing) : kept, outcome
    end
    field = solved(field, r)
    times = copy(Vector{Float64}(r.times))
    V = vectors(field)
    u0 = borrow(V, r.u0)
    states = reshape(borrow(V, r.out), field.n, 1, length(times))
    copyto!(view(states, :, 1, 1), u0)
    event = field.event == C_NULL ? nothing : Event(field, u0)
    outputs = Outputs(event === nothing ? times : times[1:1], states, 1, 2, first_step(r, u0), V)
    integrator = prepare(field, alg, r, u0, outputs, event)
    sol = solve!(integrator)
    event === nothing || copyto!(view(states, :, 1, 2), integrator.u)
    time = event === nothing ? NaN : event.time
    return Solve{T, typeof(field)}(field, sol, outputs.steps), Outcome(sol, integrator, states, time, 1)
end

"""
    repeated(field, alg, request)

A solve to be made again and again from other first states, with what it needs made once: it keeps no dense output.
"""
repeated(field, alg, r::Request) = is_alone(field, r) ? Alone(field, r) : Repeated(solved(field, r), alg, r)

"Such a solve by an integrator of SciML's."
struct Repeated{T, F, O, I}
    field::F
    u0::Vector{T}
    outputs::O
    integrator::I
end

function Repeated(field::Union{Field{T}, Source{T}}, alg, r::Request) where {T}
    times, u0 = copy(Vector{Float64}(r.times)), Vector{T}(r.u0)[1:(field.n)]
    outputs = Outputs(times, Array{T}(undef, field.n, 1, length(times)), 1, 2, first_step(r, u0), Vector{T})
    integrator = prepare(field, alg, r, u0, outputs, nothing)
    return Repeated{T, typeof(field), typeof(outputs), typeof(integrator)}(field, u0, outputs, integrator)
end

"""
    again!(repeated, u0, out) -> Union{Nothing, Solve}, Outcome

Solve from the state at the address `u0`, and write the states at the output times to `out`. There is a `Solve` where
steps are kept; its field is that of all such solves, and holds what it held at the last of them.
"""
function again!(s::Alone{T}, u0, out) where {T}
    outcome = run!(s, Ptr{T}(pointer_to(u0)), Ptr{T}(pointer_to(out)))
    s.keep || return nothing, outcome
    return Solve{T, typeof(s.field)}(s.field, nothing, s.trail), outcome
end

function again!(s::Repeated{T, F}, u0, out) where {T, F}
    (; outputs, integrator) = s
    states = outputs.out
    unsafe_copyto!(pointer(s.u0), Ptr{T}(pointer_to(u0)), length(s.u0))
    copyto!(view(states, :, 1, 1), s.u0)
    outputs.next = 2
    if outputs.steps !== nothing
        outputs.steps = like(outputs.steps)
        note!(outputs.steps, s.u0, outputs.times[1])
    end
    (; stats) = integrator  # `reinit!` counts on
    stats.nf = stats.naccept = stats.nreject = stats.njacs = stats.nw = stats.nnonliniter = 0
    restart!(integrator, s.u0)
    sol = solve!(integrator)
    unsafe_copyto!(Ptr{T}(pointer_to(out)), pointer(states), length(states))
    kept = outputs.steps === nothing ? nothing : Solve{T, F}(s.field, nothing, outputs.steps)
    return kept, Outcome(sol, integrator, states, NaN, 1)
end

"The field as a request has it solved: the solver compiled for it, or not."
solved(field, r::Request) = r.full == 0 ? field : inlined(field)

"How a request has steps chosen that are no longer than `longest`, as keywords of the solver."
function stepping(alg, r::Union{Request, AdjointRequest}, direction, longest)
    controller = if r.beta1 == 0
        default_controller(Float64, alg)
    else
        (; beta1, beta2, gamma, qmin, qmax) = r
        PIController(Float64, alg; beta1, beta2, gamma, qmin, qmax, qmax_first_step = qmax)
    end
    return (;
        controller, dt = r.first_step == 0 ? nothing : direction * r.first_step,
        dtmax = direction * min(r.max_step, longest), dtmin = r.min_step, force_dtmin = r.min_step > 0,
        maxiters = r.max_steps, d_discontinuities = copy(Vector{Float64}(r.jumps)),
    )
end

"The first step, where the algorithm is not to choose it."
first_dt(alg, direction, longest) = (;)

"The problem that an algorithm solves."
posed(alg, field, mass, u0, span, full) =
    ODEProblem(ode_function(field; mass_matrix = mass, full), u0, span, field.parameters)

"The integrator of a solve from `u0`, at the first of the request's times."
function prepare(field, alg, r::Request, u0::AbstractVector{T}, outputs::Outputs{T}, event) where {T}
    times = Vector{Float64}(r.times)
    direction = times[2] < times[1] ? -1.0 : 1.0
    span = event === nothing ? (times[1], times[end]) : (times[1], direction * Inf)
    mass = r.mass.length == 0 ? I : beside(u0, copy(reshape(Vector{T}(r.mass), field.n, field.n)))
    problem = posed(alg, field, mass, u0, span, r.full != 0)
    written = DiscreteCallback(Due(outputs), outputs; save_positions = (false, false))
    callback = if event === nothing
        CallbackSet(written)
    else
        CallbackSet(ContinuousCallback(event, Stop(event); save_positions = (false, false)), written)
    end
    adaptive = r.fixed == 0 && isadaptive(alg)
    tstops, steps = copy(Vector{Float64}(r.stops)), stepping(alg, r, direction, abs(span[2] - span[1]))
    if r.first_step == 0 && !adaptive
        append!(tstops, times)
        steps = merge(steps, (; dt = times[end] - times[1]))
    elseif r.first_step == 0
        steps = merge(steps, first_dt(alg, direction, abs(span[2] - span[1])))
    end
    dense = r.dense != 0
    # Between steps the state is asked for unless the end alone is.
    calck = dense || event !== nothing || length(times) > 2
    offsets = r.offsets.length == 0 ? [0, length(u0)] : copy(Vector{Int64}(r.offsets))
    return init(
        problem, alg;
        reltol = beside(u0, tolerance(r.rtol)), abstol = beside(u0, tolerance(r.atol)), adaptive, callback, dense, tstops,
        save_everystep = dense, save_start = dense, save_end = dense, calck,
        # A start that the algebraic equations of a mass matrix do not hold for is the caller's to refuse.
        internalnorm = LargestRMS(offsets), verbose = SILENT, initializealg = NoInit(), steps...
    )
end

function Outcome(sol, integrator, states, event_time, system)
    (; stats, retcode) = sol
    # Steps that became too small are reported as an unstable solution, whatever is the cause.
    finite = retcode == ReturnCode.Unstable ? goes_on(integrator) : all(isfinite, states)
    return Outcome(
        code_name(retcode), integrator.t, integrator.dt, event_time, stats.naccept, stats.nreject, stats.njacs, stats.nw,
        stats.nnonliniter, stats.nf, system, finite,
    )
end

"Whether the field is finite where the solver gave up, and just after it."
function goes_on(integrator)
    (; u, t, p, f, tdir) = integrator
    slope = similar(u)
    slope!(f, slope, u, p, t)
    ahead = tdir * sqrt(eps(eltype(u))) * max(1, abs(t))
    slope!(f, slope, u .+ eltype(u)(ahead) .* slope, p, t + ahead)
    return all(isfinite, slope)
end

slope!(f, slope, u, p, t) = f(slope, u, p, t)

"""
    sweep(field::Field{T}, alg, request, systems) -> Outcome

Solve independent systems one after the other, each with steps of its own; on several threads where Julia has them.

`field` is that of one system, compiled. The states in `request` are those of all systems, one after the other, at each
time. The outcome is that of the first system that fails, with the work of all.

# Arguments

  - `systems`: a [`Systems`](@ref).
"""
function sweep(field::Field{T}, alg, r::Request, s::Systems) where {T}
    states = reshape(Vector{T}(r.out), field.n, s.count, r.times.length)
    states[:, :, 1] = Vector{T}(r.u0)
    parts = Iterators.partition(1:(s.count), cld(s.count, Threads.nthreads()))
    length(parts) == 1 && return sweep(only(parts), copy(field), alg, r, s, states)
    tasks = [Threads.@spawn sweep(part, copy(field), alg, r, s, states) for part in parts]
    return reduce(together, fetch.(tasks))
end

"The outcome of the systems `part`, or of the first that fails, with the work of all; `own` is set to each in turn."
function sweep(part, own::Field{T}, alg, r::Request, s::Systems, states) where {T}
    places = Vector{Int64}(s.places)
    values = reshape(Vector{T}(s.values), length(places), s.count)
    slopes = reshape(Vector{T}(s.slopes), own.n, s.count)
    u0 = states[:, first(part), 1]
    outputs = Outputs(copy(Vector{Float64}(r.times)), states, first(part), 2, nothing, Vector{T})
    field, integrator = solved(own, r), nothing
    local outcome
    for i in part
        for (place, value) in zip(places, view(values, :, i))
            set_held!(own, place, value)
        end
        prepare!(own)
        copyto!(u0, view(states, :, i, 1))
        native(own, own.f, view(slopes, :, i), u0, u0, own.parameters, outputs.times[1])
        outputs.system, outputs.next = i, 2
        integrator = begin_again!(integrator, field, alg, r, u0, outputs)
        sol = solve!(integrator)
        outcome = Outcome(sol, integrator, view(states, :, i, :), NaN, i)
        succeeded(outcome) || break
    end
    return outcome
end

begin_again!(::Nothing, field, alg, r, u0, outputs) = prepare(field, alg, r, u0, outputs, nothing)
begin_again!(integrator, field, alg, r, u0, outputs) = restart!(integrator, u0)

function restart!(integrator, u0)
    reinit!(integrator, u0)
    # It chooses a first step, but leaves one that was asked for as the last solve left it.
    if !iszero(integrator.dtcache)
        integrator.dt = integrator.dtpropose = integrator.dtcache
    end
    return integrator
end

succeeded(o::Outcome) = o.code == code_name(ReturnCode.Success) && o.finite != 0

"The outcome of the first that failed, with the work of both."
function together(a::Outcome, b::Outcome)
    o = succeeded(a) && !succeeded(b) ? b : a
    return Outcome(
        o.code, o.t, o.dt, o.event_time, a.naccept + b.naccept, a.nreject + b.nreject, a.njac + b.njac, a.nlu + b.nlu,
        a.nnewton + b.nnewton, a.nf + b.nf, o.system, o.finite,
    )
end

# A symbol's text is never freed.
code_name(retcode) = Base.unsafe_convert(Ptr{UInt8}, Symbol(retcode))

"The state at `m` times, any within the span of a solve that was `dense`, to `out`; both are addresses."
function interpolate!(s::Solve{T}, times::Int64, out::Int64, m::Int64) where {T}
    n = s.field.n
    states = reshape(borrow(vectors(s.field), Lent(pointer_to(out), m * n)), n, m)
    for (column, t) in zip(eachcol(states), Vector{Float64}(Lent(pointer_to(times), m)))
        s.sol(column, t)
    end
    return nothing
end

"""
    adjoint!(solve, name, alg, request) -> Outcome

The gradient of a loss of the states at `times` with the cotangents `g`, by the adjoint method `name` of
SciMLSensitivity, which must be loaded: with respect to the state at `times[1]` (without `g` there), and to the
parameters. `request` is an [`AdjointRequest`](@ref), the outcome that of the backward solve: where it failed there is no
gradient.
"""
function adjoint! end
