# Memory that belongs to the caller, as arrays.

"`length` numbers at an address. Layout as in C."
struct Lent
    address::Ptr{Cvoid}
    length::Int64
end

lend(a::Array) = Lent(pointer(a), length(a))

"An address, wherever the memory is."
address_of(a) = Ptr{Cvoid}(UInt(pointer(a)))

"What was lent, as an array: no copy. Whoever calls this keeps the owner of the memory for as long as the array."
function Base.Vector{T}(lent::Lent) where {T}
    # The address of an empty tensor is 0, which unsafe_wrap refuses.
    return lent.length == 0 ? T[] : unsafe_wrap(Array, Ptr{T}(lent.address), lent.length)
end

"""
    DEVICES

What vectors of a device are, by its kind: `(T) -> V`, the type of vectors of `T` there. The state of a field on such a
device, and all that is as large, are arrays of this kind; times and tolerances are the host's. A package extension that
adds a kind adds methods of [`borrow`](@ref), and of [`at_place`](@ref) where there are devices and streams to choose.
"""
const DEVICES = Dict{Int64, Any}(0 => (T -> Vector{T}))

"Where a field's arrays are: the kind of device (0 is the host), which of them, and the stream that work goes to."
struct Place
    kind::Int64
    device::Int64
    stream::Ptr{Cvoid}
end
Place() = Place(0, 0, C_NULL)

"The type of vectors of `T` at a place."
function vector_type(::Type{T}, place::Place) where {T}
    haskey(DEVICES, place.kind) || error("no package for devices of kind $(place.kind) is loaded")
    return DEVICES[place.kind](T)
end

"What was lent, as a vector of a kind: no copy."
borrow(::Type{Vector{T}}, lent::Lent) where {T} = Vector{T}(lent)

"What `f` returns, called where work goes to the place's device and stream."
at_place(f, ::Type{<:Vector}, place::Place) = f()

"Numbers of the host's as an array like `u`, which may be elsewhere; one number is itself."
beside(u, x::Number) = x
beside(u::Array, x::Array) = x
beside(u, x::Array{T, N}) where {T, N} = copyto!(similar(u, T, size(x)), x)

"""
What a solve is asked for. Layout as in C: the caller fills one in its own memory and passes its address.

`T` is the state's type.

  - `u0`, `out`: of `T`, the first state, and room for the state at each output time, one after the other.
  - `times`: of Float64, monotone; the first is that of `u0`.
  - `offsets`: of Int64, where the tensors of the state lie in it: tensor i is `offsets[i] + 1 : offsets[i + 1]`;
    empty where it is one.
  - `rtol`, `atol`: of Float64, one number or one for each of the state.
  - `stops`, `jumps`: of Float64, times that a step ends at, and where the field jumps.
  - `mass`: of `T`, the mass matrix in column-major order; empty for the identity.
  - `first_step`: 0 lets the solver choose; with `fixed` it is the step, and 0 steps from time to time.
  - `beta1`, `beta2`, `gamma`, `qmin`, `qmax`: of a `PIController`; with `beta1` 0 the control is the algorithm's own.
  - `a`, `c`, `p`, `e`, `stages`, `fsal`, `order`: of an explicit method with error control, as [`Abreast`](@ref) has them:
    a compiled field of which nothing is asked but states is solved by our own loop; empty where it is not to be.
  - `fixed`: no control of the step size. `dense`: keep what dense output and adjoints need. `keep`: keep the ends of the
    accepted steps if it is 1, and if it is 2 the states of [`Checkpoints`](@ref). `full`: compile the solver for this very
    field, where that is a [`Source`](@ref) or [`inlined`](@ref).
"""
struct Request
    u0::Lent
    out::Lent
    times::Lent
    offsets::Lent
    rtol::Lent
    atol::Lent
    stops::Lent
    jumps::Lent
    mass::Lent
    a::Lent
    c::Lent
    p::Lent
    e::Lent
    first_step::Float64
    min_step::Float64
    max_step::Float64
    beta1::Float64
    beta2::Float64
    gamma::Float64
    qmin::Float64
    qmax::Float64
    max_steps::Int64
    fixed::Int64
    dense::Int64
    keep::Int64
    full::Int64
    stages::Int64
    fsal::Int64
    order::Int64
end

"""
What an adjoint is asked for: `du0`, `dp` to write the gradients to, `g` the cotangents at `times`. As [`Request`](@ref).
`slopes`: with a mass matrix, room for the derivative of the state at each time, or empty.
"""
struct AdjointRequest
    du0::Lent
    dp::Lent
    g::Lent
    times::Lent
    rtol::Lent
    atol::Lent
    stops::Lent
    jumps::Lent
    slopes::Lent
    first_step::Float64
    min_step::Float64
    max_step::Float64
    beta1::Float64
    beta2::Float64
    gamma::Float64
    qmin::Float64
    qmax::Float64
    max_steps::Int64
end

"""
What a replay is asked for: as [`AdjointRequest`](@ref), and the method, a [`Tableau`](@ref), in Float64.

  - `a`: (rows, rows), column l the weights of the stages for stage l. `c`: (rows,). `p`: (degree, rows).
  - `stages`: those of the step; the end of it, and what dense output needs besides, are the other rows.

Or an [`AdditiveReplay`](@ref)'s: of its `a` those of both parts, one after the other, and no `p`.

  - `atol`: how far from where it was a step may end before that counts.
"""
struct ReplayRequest
    du0::Lent
    dp::Lent
    g::Lent
    times::Lent
    a::Lent
    c::Lent
    p::Lent
    stages::Int64
    atol::Float64
end

"""
How a replay went. As [`Request`](@ref).

  - `apart`: the largest distance of a step's end from where it was in the forward solve, over the size of the state.
  - `nf`: calls of the field.
"""
struct Replayed
    apart::Float64
    nf::Int64
end

"""
The C functions of a [`Field`](@ref) over `n` numbers, 0 where there is none, the number of its parameters, and its
[`Place`](@ref). As [`Request`](@ref).
"""
struct Functions
    n::Int64
    parameters::Int64
    kind::Int64
    device::Int64
    stream::Ptr{Cvoid}
    f::Ptr{Cvoid}
    jac::Ptr{Cvoid}
    tgrad::Ptr{Cvoid}
    jvp::Ptr{Cvoid}
    vjp::Ptr{Cvoid}
    vjp_p::Ptr{Cvoid}
    event::Ptr{Cvoid}
end

"""
How a solve went. As [`Request`](@ref).

  - `code`: name of the `ReturnCode`, zero-terminated, for ever.
  - `t`, `dt`: where it ended, and the step it was about to take.
  - `event_time`: NaN where no event ended it. `system`: of several, the one that this is of, from 1.
  - `finite`: whether all states are; where steps became too small, whether the field is, there and just after.
"""
struct Outcome
    code::Ptr{UInt8}
    t::Float64
    dt::Float64
    event_time::Float64
    naccept::Int64
    nreject::Int64
    njac::Int64
    nlu::Int64
    nnewton::Int64
    nf::Int64
    system::Int64
    finite::Int64
end

"""
The `count` independent systems of a sweep. As [`Request`](@ref).

  - `places`: of Int64, which of the numbers that the field holds, its parameters and then its constants, differ from
    system to system; `values`: of `T`, these numbers of each system.
  - `slopes`: of `T`, room for the field at the start of each system.
"""
struct Systems
    count::Int64
    places::Lent
    values::Lent
    slopes::Lent
end

"A structure for C by the names of its fields; arrays are lent, and what is not named is empty or 0."
function structure(::Type{S}; given...) where {S}
    empty(::Type{Lent}) = Lent(C_NULL, 0)
    empty(::Type{Ptr{T}}) where {T} = Ptr{T}(C_NULL)
    empty(::Type{T}) where {T <: Number} = zero(T)
    as(::Type, x) = x
    as(::Type{Lent}, x::Array) = lend(x)
    return S(map((name, T) -> as(T, get(given, name, empty(T))), fieldnames(S), fieldtypes(S))...)
end

"One number, or one for each of the state."
function tolerance(lent::Lent)
    values = Vector{Float64}(lent)
    return length(values) == 1 ? only(values) : copy(values)
end
