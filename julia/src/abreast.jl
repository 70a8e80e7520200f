# Sweeps of systems by explicit Runge-Kutta and by Rosenbrock methods, eight systems abreast: each with steps of its own. A
# system that has come to its end makes place for the next one at once.

"""
The `count` systems of such a sweep, and the method, a [`Tableau`](@ref) with its error estimates. As [`Request`](@ref).

  - `places`, `values`: as in [`Systems`](@ref). `slopes`: room for the field at the start of each system.
  - `f`: the field of eight systems, as [`compile_packed`](@ref) makes it.
  - `a`, `c`, `p`, `stages`: as in [`ReplayRequest`](@ref). `e`: (rows, 1 or 2), the weights of the stages in the error; of
    two estimates the first is damped by the second. `fsal`: whether they need the slope at the end of the step.
  - `b`, `d`, `gammas`, `gamma`, `jac`, `tgrad`: of a [`Rosenbrock`](@ref) method alone; the last two are functions as `f`
    is. `a`, `c`, `e` and `p` are then of its stages.
  - `event`: event functions of eight systems, `margins` numbers, as `f` is; null for none. Each system then ends where the
    first of them crosses zero, in `direction` from its first time. `event_numbers`: what they hold, of which the first
    `event_parameters` are parameters; `event_places`, `event_values`: of that, as `places` and `values`; `event_work`:
    numbers that they need room for. `event_times`: of Float64, for the times of the events, which stay as they are where
    there is none. `event_slopes`: for the slopes of the states there; `event_margins`, (margins, 2, count): for the values
    of the functions at the starts and at the events.
  - `order`: of the method. `own`: whether `times` has times for each system, one system after the other.
  - `go_on`: a system that fails is NaN from there on, and the others go on.
  - `naccept`, `nreject`: of Int64, room for the steps of each. `codes`: of Int64, for 0 where a system came to its end, or
    the number of a cause in [`CAUSES`](@ref). `ends`: of Float64, for where each ended, and the step that it was about to
    take.
"""
struct Abreast
    count::Int64
    places::Lent
    values::Lent
    slopes::Lent
    f::Ptr{Cvoid}
    a::Lent
    c::Lent
    p::Lent
    e::Lent
    stages::Int64
    fsal::Int64
    order::Int64
    own::Int64
    go_on::Int64
    naccept::Lent
    nreject::Lent
    codes::Lent
    ends::Lent
    b::Lent
    d::Lent
    gammas::Lent
    gamma::Float64
    jac::Ptr{Cvoid}
    tgrad::Ptr{Cvoid}
    event::Ptr{Cvoid}
    margins::Int64
    event_parameters::Int64
    event_work::Int64
    direction::Int64
    event_numbers::Lent
    event_places::Lent
    event_values::Lent
    event_times::Lent
    event_slopes::Lent
    event_margins::Lent
end

"""
What the gradient of a sweep is asked for. As [`ReplayRequest`](@ref), for each system.

  - `du0`: (n, count). `dp`: of all parameters, the sum over the systems. `dv`: (places, count), of the parameters that each
    system has of its own, 0 of the constants among them; these are 0 in `dp`.
  - `g`: (n, count, times). `dt`: (times, count), by the times; empty where these are not asked for, and else `states` are
    those that the sweep gave, (n, count, times). `pull`: both products of eight systems, as [`compile_packed`](@ref) makes it.
  - `bend`: of a [`Rosenbrock`](@ref) method alone. Such a function too: of `v`, n^2 numbers M in column-major order and then
    n numbers r, it gives the derivatives of Σ M[i, j] ∂f[i]/∂u[j] + Σ r[i] ∂f[i]/∂t by the state and the parameters.
"""
struct PullRequest
    du0::Lent
    dp::Lent
    dv::Lent
    g::Lent
    dt::Lent
    states::Lent
    pull::Ptr{Cvoid}
    bend::Ptr{Cvoid}
end

# Of the last two the state, or an event function, is NaN.
const CAUSES = (
    ReturnCode.MaxIters, ReturnCode.Unstable, ReturnCode.DtLessThanMin, ReturnCode.DtNaN, ReturnCode.DtNaN,
)

"""
A Rosenbrock method in the form that needs no product with the Jacobian J (Hairer & Wanner, Solving ODEs II, IV.7):

    (1 / (γ dt) - J) k[i] = f(t + c[i] dt, u + Σ a[j, i] k[j]) + Σ d[j, i] k[j] / dt + gammas[i] dt ∂f/∂t

and y = u + Σ b[j] k[j], the error Σ e[j] k[j], the dense output u + Σ k[j] Σ p[l, j] θ^l.
"""
struct Rosenbrock{T}
    s::Int
    a::Weights{T}
    b::Weights{T}
    d::Weights{T}
    e::Weights{T}
    c::Vector{Float64}
    gammas::Vector{T}
    gamma::T
    p::Matrix{Float64}
    jac::Ptr{Cvoid}
    tgrad::Ptr{Cvoid}
    W::Vector{T}
    swapped::Vector{T}
    rate::Vector{T}
    rhs::Vector{T}
end

function Rosenbrock{T}(s::Abreast, n) where {T}
    c = copy(Vector{Float64}(s.c))
    count = length(c)
    square(x) = Weights{T}(reshape(Vector{Float64}(x), count, count))
    column(x) = Weights{T}(reshape(Vector{Float64}(x), count, 1))
    room(m) = zeros(T, WIDTH * m)
    return Rosenbrock{T}(
        count, square(s.a), column(s.b), square(s.d), column(s.e), c, T.(Vector{Float64}(s.gammas)), T(s.gamma),
        copy(reshape(Vector{Float64}(s.p), :, count)), s.jac, s.tgrad, room(n * n), room(n * n), room(n), room(n)
    )
end

rows(m::Rosenbrock) = m.s
filled(m::Rosenbrock) = m.s
calls(m::Rosenbrock) = (m.s, false)
unit(m::Rosenbrock, dt) = one(eltype(dt))
polynomial(m::Rosenbrock, l) = view(m.p, :, l)
finish!(crew, f, m::Rosenbrock) = nothing
complete!(crew, f, m::Rosenbrock, points) = nothing

"Another one for another thread, with room of its own."
Base.copy(m::Rosenbrock{T}) where {T} = Rosenbrock{T}(
    m.s, m.a, m.b, m.d, m.e, m.c, m.gammas, m.gamma, m.p, m.jac, m.tgrad, copy(m.W), copy(m.swapped), copy(m.rate), copy(m.rhs)
)
Base.copy(m::Embedded) = m

"""
Some of the steps that were accepted, in blocks of eight lanes: at each block the states (n of each lane) and the times that
they begin at, their lengths, and the systems that made them; 0 for a lane without.
"""
struct Chunk{T}
    states::Vector{T}
    times::Vector{Float64}
    steps::Vector{Float64}
    systems::Vector{Int32}
end

"Blocks in a chunk."
const CHUNK = 512

function Chunk{T}(n) where {T}
    lanes = CHUNK * WIDTH
    room(S, m) = Vector{S}(undef, m * lanes)
    return Chunk{T}(room(T, n), room(Float64, 1), room(Float64, 1), room(Int32, 1))
end

"Steps in as many chunks as they need; `blocks` are written."
mutable struct Track{T}
    const n::Int
    const chunks::Vector{Chunk{T}}
    blocks::Int
end
Track{T}(n) where {T} = Track{T}(n, Chunk{T}[], 0)

"The chunk that block j lies in, and how many blocks lie there before it."
@inline function place_of(track::Track, j)
    c, before = divrem(j - 1, CHUNK)
    return @inbounds(track.chunks[c + 1]), before
end

# Chunks for the next sweep, by the numbers of their systems. Fresh memory takes longer to come by than to fill.
const SPARE = Dict{Tuple{DataType, Int}, Vector{Any}}()
const SPARE_LOCK = Threads.SpinLock()
const SPARE_BYTES = Ref(0)
const MOST_SPARE = 2^27

bytes(c::Chunk) = sizeof(c.states) + sizeof(c.times) + sizeof(c.steps) + sizeof(c.systems)

"A chunk, an old one if there is one."
function take_chunk(::Type{T}, n) where {T}
    @lock SPARE_LOCK begin
        spare = get(SPARE, (T, n), nothing)
        if spare !== nothing && !isempty(spare)
            old = pop!(spare)::Chunk{T}
            SPARE_BYTES[] -= bytes(old)
            return old
        end
    end
    return Chunk{T}(n)
end

"Nobody needs these steps any more."
recycle!(x) = nothing
function recycle!(track::Track{T}) where {T}
    @lock SPARE_LOCK for chunk in track.chunks
        SPARE_BYTES[] + bytes(chunk) > MOST_SPARE && break
        SPARE_BYTES[] += bytes(chunk)
        push!(get!(Vector{Any}, SPARE, (T, track.n)), chunk)
    end
    empty!(track.chunks)
    return nothing
end

"Room for what eight systems hold, compute and are at."
struct Crew{T}
    n::Int
    rows::Int
    u::Vector{T}
    y::Vector{T}
    k::Vector{T}
    p::Vector{T}
    c::Vector{T}
    work::Vector{T}
    time::Vector{T}
    t::Vector{Float64}
    dt::Vector{Float64}
end

function Crew(field::Field{T}, rows) where {T}
    n = field.n
    room(m) = zeros(T, WIDTH * m)
    all(x) = repeat(x; inner = WIDTH)
    work = room(max(length(field.work), 1))
    return Crew{T}(
        n, rows, room(n), room(n), room(n * rows), all(field.parameters), all(field.constants), work, room(1),
        zeros(WIDTH), zeros(WIDTH),
    )
end

@inline at_lane(i, w) = (i - 1) * WIDTH + w

"Put the numbers of a system into lane w."
function fill_lane!(x::Vector, w, values)
    for (i, value) in enumerate(values)
        @inbounds x[at_lane(i, w)] = value
    end
    return nothing
end

"Has lane w hold what a system holds of its own, at places among parameters and then constants."
function hold!(crew::Crew, w, places, values)
    m = length(crew.p) ÷ WIDTH
    for (place, value) in zip(places, values)
        place <= m ? (crew.p[at_lane(place, w)] = value) : (crew.c[at_lane(place - m, w)] = value)
    end
    return nothing
end

places(crew::Crew) = crew.n
numbers(::Crew, x) = numbers(x)

"The times t + part dt, of type T."
@inline function set_time!(crew::Crew{T}, part) where {T}
    (; time, t, dt) = crew
    @inbounds @simd for w in 1:WIDTH
        time[w] = T(muladd(part, dt[w], t[w]))
    end
    return nothing
end

"Call a function of eight systems at the state y and the times `crew.time`."
@inline function packed(f::Ptr{Cvoid}, crew::Crew{T}, out::Ptr{T}, v::Ptr{T}, y::Ptr{T}) where {T}
    @ccall $f(
        out::Ptr{T}, v::Ptr{T}, y::Ptr{T}, pointer(crew.p)::Ptr{T}, pointer(crew.c)::Ptr{T}, pointer(crew.work)::Ptr{T},
        pointer(crew.time)::Ptr{T}
    )::Cvoid
    return nothing
end

function field_at!(crew::Crew, f, to, y, c)
    set_time!(crew, c)
    packed(f, crew, to, y, y)
    return nothing
end

"The steps as numbers of the state's type."
@inline steps_of(crew::Crew{T}) where {T} = Pack{T}(ntuple(w -> VecElement(T(@inbounds crew.dt[w])), Val(WIDTH)))

"y = u + Σ k[j] by[j], or without u."
@inline function sum_of!(y::PackNumbers{T}, u, k, from, by, n) where {T}
    for i in 1:n
        total = u === nothing ? Pack{T}(0) : u[i]
        for j in eachindex(from)
            total = muladd(k[(from[j] - 1) * n + i], @inbounds(by[j]), total)
        end
        y[i] = total
    end
    return nothing
end

function attempt!(crew::Crew{T}, f, m::Rosenbrock{T}) where {T}
    (; n, u, y, k) = crew
    un, yn, kn, rate, rhs = numbers(u), numbers(y), numbers(k), numbers(m.rate), numbers(m.rhs)
    dt = steps_of(crew)
    dt = ifelse(dt == zero(T), one(T), dt)  # of a lane without a system
    inverse = one(T) / dt
    set_time!(crew, 0.0)
    GC.@preserve m begin
        packed(m.jac, crew, pointer(m.W), un.address, un.address)
        packed(m.tgrad, crew, rate.address, un.address, un.address)
        factorise!(numbers(m.W), numbers(m.swapped), inverse / m.gamma, n)
        for l in 1:(m.s)
            sum_of!(yn, un, kn, m.a.from[l], m.a.by[l], n)
            set_time!(crew, m.c[l])
            packed(f, crew, rhs.address, yn.address, yn.address)
            to = kn + (l - 1) * n
            sum_of!(to, nothing, kn, m.d.from[l], m.d.by[l], n)
            for i in 1:n
                to[i] = muladd(dt * m.gammas[l], rate[i], muladd(inverse, to[i], rhs[i]))
            end
            solve_factorised!(to, numbers(m.W), numbers(m.swapped), n)
        end
        sum_of!(yn, un, kn, m.b.from[1], m.b.by[1], n)
    end
    return nothing
end

"Turn J into the factors of (shift - J), in column-major order, with rows exchanged lane by lane where `swapped`."
function factorise!(A::PackNumbers{T}, swapped, shift, n) where {T}
    at(i, j) = i + (j - 1) * n
    for j in 1:n, i in 1:n
        A[at(i, j)] = i == j ? shift - A[at(i, j)] : -A[at(i, j)]
    end
    for j in 1:n
        for i in (j + 1):n
            larger = Elementary.abs(A[at(j, j)]) < Elementary.abs(A[at(i, j)])
            swapped[at(i, j)] = ifelse(larger, one(T), zero(T))
            for l in 1:n
                x, y = A[at(i, l)], A[at(j, l)]
                A[at(i, l)], A[at(j, l)] = ifelse(larger, y, x), ifelse(larger, x, y)
            end
        end
        inverse = one(T) / A[at(j, j)]
        for i in (j + 1):n
            A[at(i, j)] = A[at(i, j)] * inverse
        end
        for l in (j + 1):n, i in (j + 1):n
            A[at(i, l)] = A[at(i, l)] - A[at(i, j)] * A[at(j, l)]
        end
        A[at(j, j)] = inverse
    end
    return nothing
end

function solve_factorised!(x::PackNumbers{T}, A, swapped, n) where {T}
    at(i, j) = i + (j - 1) * n
    for j in 1:n, i in (j + 1):n
        larger = swapped[at(i, j)] == one(T)
        x[i], x[j] = ifelse(larger, x[j], x[i]), ifelse(larger, x[i], x[j])
    end
    for j in 1:n, i in (j + 1):n
        x[i] = x[i] - A[at(i, j)] * x[j]
    end
    for j in n:-1:1
        x[j] = x[j] * A[at(j, j)]
        for i in 1:(j - 1)
            x[i] = x[i] - A[at(i, j)] * x[j]
        end
    end
    return nothing
end

"The same with the transposed matrix."
function solve_transposed!(x::PackNumbers{T}, A, swapped, n) where {T}
    at(i, j) = i + (j - 1) * n
    for j in 1:n
        for i in 1:(j - 1)
            x[j] = x[j] - A[at(i, j)] * x[i]
        end
        x[j] = x[j] * A[at(j, j)]
    end
    for j in n:-1:1, i in (j + 1):n
        x[j] = x[j] - A[at(i, j)] * x[i]
    end
    for j in n:-1:1, i in n:-1:(j + 1)
        larger = swapped[at(i, j)] == one(T)
        x[i], x[j] = ifelse(larger, x[j], x[i]), ifelse(larger, x[i], x[j])
    end
    return nothing
end

"""
The norms of an error over the tolerances: root mean squares, over several tensors (at `offsets`) the largest of theirs.
`rtol`, `atol`: of the systems in the lanes, and `room`: WIDTH n numbers each.
"""
struct Norms{T}
    rtol::Vector{T}
    atol::Vector{T}
    offsets::Vector{Int}
    room::Vector{T}
end

function error_of(crew::Crew{T}, from, by, dt, norms::Norms{T}) where {T}
    (; n, u, y, k) = crew
    (; offsets, room) = norms
    un, yn, kn = numbers(u), numbers(y), numbers(k)
    rtol, atol = numbers(norms.rtol), numbers(norms.atol)
    if length(offsets) == 2
        return Elementary.sqrt(squares_of_error(un, yn, kn, from, by, n, dt, rtol, atol, nothing) / T(n))
    end
    parts, largest = numbers(room), Pack{T}(0)
    squares_of_error(un, yn, kn, from, by, n, dt, rtol, atol, parts)
    for j in 2:length(offsets)
        total = Pack{T}(0)
        for i in (offsets[j - 1] + 1):offsets[j]
            total = muladd(parts[i], parts[i], total)
        end
        largest = Elementary.max(largest, Elementary.sqrt(total / T(max(offsets[j] - offsets[j - 1], 1))))
    end
    return largest
end

errors(crew::Crew{T}, m::Rosenbrock{T}, norms) where {T} = error_of(crew, m.e.from[1], m.e.by[1], Pack{T}(1), norms)

function errors(crew::Crew{T}, m::Embedded{T}, norms) where {T}
    dt = steps_of(crew)
    first = error_of(crew, m.e.from[1], m.e.by[1], dt, norms)
    return length(m.e.from) == 1 ? first : each(damped, first, error_of(crew, m.e.from[2], m.e.by[2], dt, norms))
end

"The state of lane w at t + θ dt, to a column."
function dense!(column, crew::Crew{T}, m, w, part) where {T}
    (; n, u, k, dt) = crew
    for i in 1:n
        column[i] = u[at_lane(i, w)]
    end
    for l in 1:rows(m)
        weight = T(unit(m, dt[w]) * part * evalpoly(part, polynomial(m, l)))
        iszero(weight) && continue
        for i in 1:n
            @inbounds column[i] = muladd(weight, k[at_lane((l - 1) * n + i, w)], column[i])
        end
    end
    return nothing
end

"The slope of that."
function slope!(column, crew::Crew{T}, m, w, part) where {T}
    (; n, k, dt) = crew
    fill!(column, zero(T))
    for l in 1:rows(m)
        p = polynomial(m, l)
        rate = 0.0
        for q in length(p):-1:1
            rate = muladd(rate, part, q * p[q])
        end
        weight = T(unit(m, dt[w]) / dt[w] * rate)
        iszero(weight) && continue
        for i in 1:n
            @inbounds column[i] = muladd(weight, k[at_lane((l - 1) * n + i, w)], column[i])
        end
    end
    return nothing
end

"Of a sweep what its gradient needs: of each part the systems, and their steps."
struct Swept{T, M}
    field::Field{T, Vector{T}}
    method::M
    f::Ptr{Cvoid}
    times::Matrix{Float64}
    places::Vector{Int64}
    values::Matrix{T}
    tracks::Vector{Track{T}}
    parts::Vector{UnitRange{Int}}
end

recycle!(swept::Swept) = foreach(recycle!, swept.tracks)

"""
    abreast(field::Field{T}, request, sweep) -> Swept{T}, Outcome

Solve independent systems, eight at a time, each with steps of its own; on several threads where Julia has them.

`field` is that of one system, compiled. The states in `request` are those of all systems, one after the other, at each
time. The outcome is that of the first system that failed, with the work of all.
"""
function abreast(field::Field{T}, r::Request, s::Abreast) where {T}
    method = s.jac == C_NULL ? Embedded{T}(s) : Rosenbrock{T}(s, field.n)
    return abreast(field, r, s, method)
end

function abreast(field::Field{T}, r::Request, s::Abreast, method) where {T}
    times = s.own == 0 ? reshape(Vector{Float64}(r.times), :, 1) : reshape(Vector{Float64}(r.times), :, s.count)
    # Where a system ends is then found out.
    times = s.event == C_NULL ? copy(times) : repeat(times[1:1, :], 2, s.own == 0 ? s.count : 1)
    states = reshape(Vector{T}(r.out), field.n, s.count, size(times, 1))
    states[:, :, 1] = Vector{T}(r.u0)
    parts = collect(Iterators.partition(1:(s.count), cld(s.count, Threads.nthreads())))
    places = copy(Vector{Int64}(s.places))
    values = copy(reshape(Vector{T}(s.values), length(places), s.count))
    tracks = [Track{T}(field.n) for _ in parts]
    swept = Swept{T, typeof(method)}(copy(field), method, s.f, times, places, values, tracks, parts)
    own = [copy(field) for _ in parts]
    work(i) = march(parts[i], own[i], r, s, swept, states, r.keep == 0 ? nothing : tracks[i])
    if length(parts) == 1
        outcome = work(1)
    else
        tasks = [Threads.@spawn work(i) for i in eachindex(parts)]
        outcome = reduce(together, fetch.(tasks))
    end
    return swept, outcome
end

"""
The event functions of the systems in a [`Crew`](@ref), with one of their own that has what they hold; `signs` are those
that they had first, (margins, lanes), and `met` is 1 for the lanes that met their event in the step, -1 where they are NaN.
"""
struct Watch{T}
    f::Ptr{Cvoid}
    crew::Crew{T}
    places::Vector{Int64}
    values::Matrix{T}
    direction::Float64
    out::Vector{T}
    point::Vector{T}
    signs::Matrix{Float64}
    met::Vector{Int}
    before::Vector{Float64}  # how far in the step the functions are known to have these signs
    good::Vector{Float64}  # by how much, or NaN
    times::Vector{Float64}
    slopes::Matrix{T}
    margins::Array{T, 3}
end

function Watch{T}(s::Abreast, n) where {T}
    all = Vector{T}(s.event_numbers)
    room(m) = zeros(T, WIDTH * m)
    hold(x) = repeat(x; inner = WIDTH)
    crew = Crew{T}(
        n, 0, T[], T[], T[], hold(all[1:(s.event_parameters)]), hold(all[(s.event_parameters + 1):end]),
        room(max(s.event_work, 1)), room(1), zeros(WIDTH), zeros(WIDTH)
    )
    places = copy(Vector{Int64}(s.event_places))
    return Watch{T}(
        s.event, crew, places, copy(reshape(Vector{T}(s.event_values), length(places), s.count)), s.direction,
        room(s.margins), room(n), zeros(s.margins, WIDTH), zeros(Int, WIDTH), zeros(WIDTH), zeros(WIDTH),
        Vector{Float64}(s.event_times), reshape(Vector{T}(s.event_slopes), n, s.count),
        reshape(Vector{T}(s.event_margins), s.margins, 2, s.count)
    )
end

mutable struct Progress
    next::Int  # the next system to begin with
    running::Int
    failed::Int  # the first system that failed, where the others do not go on; else 0
    accepted::Int
    rejected::Int
    calls::Int
end

"Which system a lane has, and how far that is."
mutable struct Runner
    system::Int  # 0 for none
    end_time::Float64
    limit::Float64  # to the length of a step
    direction::Float64
    output::Int  # the next one
    root::Float64  # (error of the last accepted step) ^ beta2
    steps::Int
    accepted::Int
    last::Bool
end
Runner() = Runner(0, 0.0, 0.0, 1.0, 0, 1.0, 0, 0, false)

"One thread's part of a sweep."
struct March{T, M}
    part::UnitRange{Int}
    field::Field{T, Vector{T}}
    crew::Crew{T}
    lanes::Vector{Runner}
    control::Control
    method::M
    swept::Swept{T, M}
    states::Array{T, 3}
    slopes::Matrix{T}
    naccept::Vector{Int64}
    nreject::Vector{Int64}
    codes::Vector{Int64}
    ends::Matrix{Float64}
    track::Union{Nothing, Track{T}}
    progress::Progress
    moved::Vector{T}  # 1 for the lanes whose step was accepted
    errors::Vector{Float64}
    powers::Vector{Float64}  # error ^ beta1
    roots::Vector{Float64}  # error ^ beta2
    point::Vector{T}
    ahead::Vector{T}
    points::Vector{T}
    failure::Vector{T}  # the state of the first that failed
    go_on::Bool
    rtol::Matrix{Float64}  # a column for each system, or one for all
    atol::Matrix{Float64}
    norms::Norms{T}
    watch::Union{Nothing, Watch{T}}
end

"Of a column for each system, or one for all, that of system i."
column_of(x::Matrix, i) = view(x, :, size(x, 2) == 1 ? 1 : i)
times_of(swept::Swept, i) = column_of(swept.times, i)

function march(part, own::Field{T}, r::Request, s::Abreast, swept::Swept{T, M}, states, track) where {T, M}
    method = copy(swept.method)
    control, count = Control(r, s.order), s.count
    tolerances(x::Number) = fill(x, own.n, 1)
    tolerances(x::Vector) = reshape(x, own.n, count)
    offsets = r.offsets.length == 0 ? [0, own.n] : copy(Vector{Int64}(r.offsets))
    march = March{T, M}(
        part, own, Crew(own, rows(method)), [Runner() for _ in 1:WIDTH], control, method, swept, states,
        reshape(Vector{T}(s.slopes), own.n, count), Vector{Int64}(s.naccept), Vector{Int64}(s.nreject),
        Vector{Int64}(s.codes), reshape(Vector{Float64}(s.ends), 2, count), track, Progress(first(part), 0, 0, 0, 0, 0),
        zeros(T, WIDTH), zeros(WIDTH), zeros(WIDTH), zeros(WIDTH), zeros(T, own.n), zeros(T, own.n),
        zeros(T, WIDTH * own.n), zeros(T, own.n), s.go_on != 0,
        tolerances(tolerance(r.rtol)), tolerances(tolerance(r.atol)),
        Norms{T}(ones(T, WIDTH * own.n), ones(T, WIDTH * own.n), offsets, zeros(T, WIDTH * own.n)),
        s.event == C_NULL ? nothing : Watch{T}(s, own.n)
    )
    GC.@preserve march own foreach(w -> begin_next!(march, w), 1:WIDTH)
    while march.progress.running > 0
        GC.@preserve march own step!(march, s.f, method)
    end
    return outcome_of(march)
end

"Have lane w begin with the next system, if there is one."
function begin_next!(m::March{T}, w) where {T}
    (; field, crew, progress, swept, states, slopes, control) = m
    place = m.lanes[w]
    while progress.next <= last(m.part) && progress.failed == 0
        i = progress.next
        progress.next += 1
        for (at, value) in zip(swept.places, view(swept.values, :, i))
            set_held!(field, at, value)
        end
        times = times_of(swept, i)
        t, t_end = times[1], m.watch === nothing ? times[end] : m.watch.direction * Inf
        start, slope = view(states, :, i, 1), view(slopes, :, i)
        copyto!(m.point, start)
        native(field, field.f, slope, m.point, m.point, field.parameters, t)
        if t == t_end
            for k in 2:length(times)
                states[:, i, k] = start
            end
            continue
        end
        direction = t_end < t ? -1.0 : 1.0
        longest = min(control.longest, abs(t_end - t))
        rtol, atol = column_of(m.rtol, i), column_of(m.atol, i)
        scale(j) = atol[j] + abs(Float64(start[j])) * rtol[j]
        norm(f) = largest_norm(i -> Float64(f(i)) / scale(i), m.norms.offsets)
        field_at(t) = native(field, field.f, m.ahead, m.point, m.point, field.parameters, t)
        h = first_step(norm, field_at, start, slope, t, direction, longest, control, m.point, m.ahead)
        progress.calls += 2
        hold!(crew, w, swept.places, view(swept.values, :, i))
        fill_lane!(crew.u, w, start)
        fill_lane!(crew.k, w, slope)
        fill_lane!(m.norms.rtol, w, rtol)
        fill_lane!(m.norms.atol, w, atol)
        crew.t[w] = t
        place.system, place.end_time, place.limit, place.direction, place.output = i, t_end, longest, direction, 2
        place.root = LEAST^control.beta2
        place.steps = place.accepted = 0
        progress.running += 1
        set_step!(m, w, h)
        m.watch === nothing || begin_watch!(m.watch, crew, w, i)
        return nothing
    end
    place.system, crew.dt[w] = 0, 0.0
    return nothing
end

"Have the next step of lane w be of length h, or to the end."
function set_step!(m::March, w, h)
    place = m.lanes[w]
    m.crew.dt[w], place.last = within_limits(
        h, m.crew.t[w], place.end_time, place.direction, place.limit, m.control
    )
    return nothing
end

"One step of each system: those that accept it go on, those that have come to their end make place."
function step!(m::March{T}, f, method) where {T}
    (; crew, lanes, control, moved, progress, n) = (; m.crew, m.lanes, m.control, m.moved, m.progress, m.field.n)
    attempt!(crew, f, method)
    store!(m.errors, errors(crew, method, m.norms))
    powers!(m.powers, m.roots, m.errors, control.beta1, control.beta2)
    accepted = 0
    for w in 1:WIDTH
        ok = lanes[w].system != 0 && is_accepted(m.errors[w], abs(crew.dt[w]), control)
        moved[w] = ok
        accepted += ok
    end
    for_step, for_end = calls(method)
    progress.calls += progress.running * for_step + accepted * for_end
    if accepted > 0
        for_end && finish!(crew, f, method)
        m.track === nothing || note!(m.track, m)
        m.watch === nothing ? write_outputs!(m, f, method) : look!(m, f, method)
        # Go on from the ends of the steps.
        mask = numbers(moved)[1] == one(T)
        u, y = numbers(crew.u), numbers(crew.y)
        for i in 1:n
            u[i] = ifelse(mask, y[i], u[i])
        end
        go_on!(crew, method, mask)
    end
    for w in 1:WIDTH
        lanes[w].system == 0 || settle!(m, w, moved[w] == 1)
    end
    return nothing
end

"The slope at the end of a step is that at the start of the next."
function go_on!(crew::Crew, method::Embedded, mask)
    k, n = numbers(crew.k), crew.n
    for i in 1:n
        k[i] = ifelse(mask, k[method.tab.s * n + i], k[i])
    end
    return nothing
end
go_on!(crew, method::Rosenbrock, mask) = nothing

function store!(to::Vector{Float64}, x::Pack)
    for w in 1:WIDTH
        to[w] = x[w]
    end
    return nothing
end

function note!(track::Track{T}, m::March{T}) where {T}
    (; crew, moved, lanes) = m
    size = WIDTH * crew.n
    track.blocks += 1
    track.blocks > CHUNK * length(track.chunks) && push!(track.chunks, take_chunk(T, crew.n))
    chunk, before = place_of(track, track.blocks)
    copyto!(chunk.states, before * size + 1, crew.u, 1, size)
    for w in 1:WIDTH
        at = before * WIDTH + w
        chunk.times[at], chunk.steps[at] = crew.t[w], crew.dt[w]
        chunk.systems[at] = moved[w] == 1 ? lanes[w].system : 0
    end
    return nothing
end

"The states at the output times that systems pass with this step."
function write_outputs!(m::March{T}, f, method) where {T}
    (; crew, lanes, states, swept, moved) = m
    done = rows(method) == filled(method)
    for w in 1:WIDTH
        place = lanes[w]
        moved[w] == 1 || continue
        times = times_of(swept, place.system)
        t = place.last ? place.end_time : crew.t[w] + crew.dt[w]
        while place.output <= length(times) && place.direction * times[place.output] <= place.direction * t
            time, column = times[place.output], view(states, :, place.system, place.output)
            if time == t
                for i in eachindex(column)
                    column[i] = crew.y[at_lane(i, w)]
                end
            else
                done || complete!(crew, f, method, m.points)
                done = true
                dense!(column, crew, method, w, (time - crew.t[w]) / crew.dt[w])
            end
            place.output += 1
        end
    end
    return nothing
end

"Choose the next step of lane w after one that was accepted or not, or have the next system begin."
function settle!(m::March{T}, w, ok) where {T}
    (; crew, control, progress, naccept, nreject, states) = m
    place, h = m.lanes[w], abs(m.crew.dt[w])
    place.steps += 1
    i = place.system
    if ok
        place.accepted += 1
        progress.accepted += 1
        if m.watch !== nothing && m.watch.met[w] != 0
            naccept[i], nreject[i] = place.accepted, place.steps - place.accepted
            progress.running -= 1
            m.watch.met[w] > 0 || fail!(m, w, 5)
            return begin_next!(m, w)
        end
        crew.t[w] = place.last ? place.end_time : crew.t[w] + crew.dt[w]
        if place.last
            naccept[i], nreject[i] = place.accepted, place.steps - place.accepted
            progress.running -= 1
            all(j -> isfinite(crew.u[at_lane(j, w)]), 1:(crew.n)) || fail!(m, w, 4)
            return begin_next!(m, w)
        end
    else
        progress.rejected += 1
    end
    h = next_length(h, ok, m.errors[w], m.powers[w], place.root, control)
    ok && (place.root = m.roots[w])
    set_step!(m, w, h)
    cause = if place.steps >= control.max_steps || !isfinite(crew.t[w] + crew.dt[w])
        1
    elseif !ok && abs(crew.dt[w]) <= eps(abs(crew.t[w]))
        2
    else
        return nothing
    end
    naccept[i], nreject[i] = place.accepted, place.steps - place.accepted
    progress.running -= 1
    # To have no event is not to fail.
    m.watch === nothing || cause != 1 ? fail!(m, w, cause) : fill!(view(states, :, i, 2), T(NaN))
    return begin_next!(m, w)
end

"Lane w's system has failed: what is left of it is NaN, and unless the others go on those after it are not asked for."
function fail!(m::March{T}, w, cause) where {T}
    (; crew, states, progress) = m
    place = m.lanes[w]
    i = place.system
    m.codes[i] = cause
    m.ends[1, i], m.ends[2, i] = crew.t[w], crew.dt[w]
    states[:, i, (cause == 4 ? size(states, 3) : place.output):end] .= T(NaN)
    m.go_on && return nothing
    if progress.failed == 0 || i < progress.failed
        progress.failed = i
        m.failure .= (crew.u[at_lane(j, w)] for j in 1:(crew.n))
        for (v, other) in enumerate(m.lanes)
            if other.system > i
                other.system, crew.dt[v] = 0, 0.0
                progress.running -= 1
            end
        end
    end
    return nothing
end

function outcome_of(m::March{T}) where {T}
    (; progress, swept, field) = m
    # A Rosenbrock method has a Jacobian for each step.
    jacobians = m.method isa Rosenbrock ? progress.accepted + progress.rejected : 0
    done(code, t, dt, system, finite) = Outcome(
        code_name(code), t, dt, NaN, progress.accepted, progress.rejected, jacobians, jacobians, 0, progress.calls, system,
        finite,
    )
    i = progress.failed
    i == 0 && return done(ReturnCode.Success, swept.times[end], 0.0, first(m.part), 1)
    for (at, value) in zip(swept.places, view(swept.values, :, i))
        set_held!(field, at, value)
    end
    cause, (t, dt) = CAUSES[m.codes[i]], view(m.ends, :, i)
    finite = cause != ReturnCode.Success
    if cause == ReturnCode.Unstable
        u, slope = m.failure, zeros(T, field.n)
        native(field, field.f, slope, u, u, field.parameters, t)
        finite = all(isfinite, slope)
    end
    return done(cause, t, dt, i, finite)
end
