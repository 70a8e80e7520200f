# A vector field, and its products, behind C function pointers.
#
# The types here do not depend on what is behind the pointers, so that solvers are compiled for them once, when the
# package is precompiled, and a new field compiles nothing.

"A callback asked for the solve to be given up; the caller knows why."
struct Abandoned <: Exception end

"Arrays that a field may show to its callbacks themselves; beyond these it shows copies."
const PINNED = 32

"""
    Field{T}(n; f, jac, tgrad, jvp, vjp, vjp_p, event, parameters)

A vector field over `n` numbers of type `T`, by the addresses of C functions (0 where there is none), which return
nothing. As their last act they set [`DONE`](@ref) to 1; one that does not gives the solve up:

    f(du, u, t)          jac(J, u, t)         tgrad(dT, u, t)        event(margin, u, t)
    jvp(out, v, u, t)    vjp(out, v, u, t)    vjp_p(out, v, u, t)

with pointers to contiguous numbers and `t` a double; `J` is in column-major order, and `margin` one double.
`parameters` says how many `vjp_p` differentiates by; their values are known to the functions alone.

A callback may keep looking at the arrays of `f` after it has returned (a tensor made of such memory is cached, and may
be kept by the user): they live for as long as the field does. There are at most $(2PINNED) of them: what a solver makes
for a moment is copied into one that stays.
"""
mutable struct Field{T, V <: AbstractVector{T}}
    const n::Int
    const f::Ptr{Cvoid}
    const jac::Ptr{Cvoid}
    const tgrad::Ptr{Cvoid}
    const jvp::Ptr{Cvoid}
    const vjp::Ptr{Cvoid}
    const vjp_p::Ptr{Cvoid}
    const event::Ptr{Cvoid}
    const pinned::Vector{V}
    const spare::Vector{V}  # a state and a slope, once they were needed
    const parameters::V
    place::Place
    # Of functions that are compiled from Julia text; see `CompiledFunctions`.
    const native::Bool
    const constants::Vector{T}
    const work::Vector{T}
    const pattern::Union{Nothing, SparseMatrixCSC{T, Int64}}
    const layers::Vector{Layer}
    const keep::Ptr{Cvoid}
    const kept::Int64
    scratch::Any  # what a replay works with, for the next one
    values::Vector{T}  # room for what `keep` writes, for the next solve
end

pointer_to(address) = Ptr{Cvoid}(UInt(address))

function Field{T}(
        n::Integer; f, jac = 0, tgrad = 0, jvp = 0, vjp = 0, vjp_p = 0, event = 0, parameters::Integer = 0
    ) where {T}
    pointers = map(pointer_to, (f, jac, tgrad, jvp, vjp, vjp_p, event))
    return Field{T}(n, pointers..., zeros(T, parameters))
end

function Field{T}(
        n, f, jac, tgrad, jvp, vjp, vjp_p, event, parameters::V, place = Place(); native = false, constants = T[], work = T[],
        pattern = nothing, layers = Layer[], keep = C_NULL, kept = 0
    ) where {T, V}
    return Field{T, V}(
        n, f, jac, tgrad, jvp, vjp, vjp_p, event, V[], V[], parameters, place, native, constants, work, pattern, layers,
        keep, kept, nothing, T[]
    )
end

function Field{T}(c::Functions) where {T}
    place = Place(c.kind, c.device, c.stream)
    V = vector_type(T, place)
    parameters = at_place(() -> fill!(V(undef, c.parameters), zero(T)), V, place)
    return Field{T}(c.n, c.f, c.jac, c.tgrad, c.jvp, c.vjp, c.vjp_p, c.event, parameters, place)
end

vectors(::Field{T, V}) where {T, V} = V

"Whether a callback may look at `a` itself."
function pin!(field::Field{T, V}, a::V) where {T, V <: AbstractVector{T}}
    for b in field.pinned
        a === b && return true
    end
    length(field.pinned) < PINNED || return false
    push!(field.pinned, a)
    return true
end
pin!(::Field, ::AbstractArray) = false

"Numbers of `T`, contiguous, wherever they are: what C functions can be given. Dual numbers, for one, are not."
const Plain{T} = AbstractArray{T}

"""
1 where the callback that was called last has come to its end, which it says itself (`done!`). What it returns would not
tell: a caller whose language has exceptions may leave it by one before its first statement.
"""
const DONE = Ref{Int64}(0)
done!() = (DONE[] = 1; nothing)
check() = DONE[] == 1 ? nothing : throw(Abandoned())

function call(f::Ptr{Cvoid}, out, u, t)
    DONE[] = 0
    GC.@preserve out u begin
        @ccall $f(address_of(out)::Ptr{Cvoid}, address_of(u)::Ptr{Cvoid}, t::Cdouble)::Cvoid
    end
    return check()
end

function call(f::Ptr{Cvoid}, out, v, u, t)
    DONE[] = 0
    GC.@preserve out v u begin
        @ccall $f(
            address_of(out)::Ptr{Cvoid}, address_of(v)::Ptr{Cvoid}, address_of(u)::Ptr{Cvoid}, t::Cdouble
        )::Cvoid
    end
    return check()
end

struct RHS{F <: Field}
    field::F
end

function (rhs::RHS)(du, u, p, t)
    field = rhs.field
    field.native && return native(field, field.f, du, u, u, p, t)
    if pin!(field, u) && pin!(field, du)
        call(field.f, du, u, t)
    else
        isempty(field.spare) && push!(field.spare, similar(field.parameters, field.n), similar(field.parameters, field.n))
        state, slope = field.spare
        copyto!(state, u)
        call(field.f, slope, state, t)
        copyto!(du, slope)
    end
    return nothing
end

struct Jacobian{F <: Field}
    field::F
end
function (j::Jacobian{<:Field{T}})(J::Plain{T}, u::Plain{T}, p, t) where {T}
    field = j.field
    field.native || return call(field.jac, J, u, t)
    pattern = field.pattern
    if pattern === nothing || (J isa SparseMatrixCSC && nnz(J) == nnz(pattern))
        return native(field, field.jac, J, u, u, p, t)
    end
    values = copy(pattern)
    native(field, field.jac, values, u, u, p, t)
    copyto!(J, values)
    return nothing
end

struct TimeGradient{F <: Field}
    field::F
end
function (g::TimeGradient{<:Field{T}})(dT::Plain{T}, u::Plain{T}, p, t) where {T}
    field = g.field
    return field.native ? native(field, field.tgrad, dT, u, u, p, t) : call(field.tgrad, dT, u, t)
end

struct JVP{F <: Field}
    field::F
end
function (jvp::JVP{<:Field{T}})(out::Plain{T}, v::Plain{T}, u::Plain{T}, p, t) where {T}
    field = jvp.field
    return field.native ? native(field, field.jvp, out, v, u, p, t) : call(field.jvp, out, v, u, t)
end

struct VJP{F <: Field}
    field::F
end
function (vjp::VJP{<:Field{T}})(out::Plain{T}, v::Plain{T}, u::Plain{T}, p, t) where {T}
    field = vjp.field
    return field.native ? native(field, field.vjp, out, v, u, p, t) : call(field.vjp, out, v, u, t)
end

struct ParameterVJP{F <: Field}
    field::F
end
function (vjp::ParameterVJP{<:Field{T}})(out::Plain{T}, v::Plain{T}, u::Plain{T}, p, t) where {T}
    field = vjp.field
    return field.native ? native(field, field.vjp_p, out, v, u, p, t) : call(field.vjp_p, out, v, u, t)
end

# SciML finds out by reflection, for a millisecond each, whether a function writes its result into its first argument.
const InPlace = Union{RHS, Jacobian, TimeGradient, JVP, VJP, ParameterVJP}
SciMLBase.isinplace(::InPlace, ::Integer, name = "f", preferred = true; kwargs...) = true

"""
The `ODEFunction` of a field. `full`: solvers are compiled for this very function.

All products are named whether they are there or not: no solver calls what it has no use for, and this way all fields
are of one type, for which solvers are compiled ahead.
"""
function ode_function(field::Field; mass_matrix = I, full = true, jac_prototype = field.pattern)
    return ODEFunction{true, FullSpecialize}(
        RHS(field);
        mass_matrix, jac_prototype,
        jac = Jacobian(field), tgrad = TimeGradient(field), jvp = JVP(field), vjp = VJP(field),
        vjp_p = ParameterVJP(field)
    )
end

"""
    Source{T}(n, f, parameters, event)

A vector field that is Julia code, `f(du, u, p, t)`, with the values of its parameters. Solvers and adjoints
differentiate it themselves.
"""
struct Source{T, F}
    n::Int
    f::F
    event::Ptr{Cvoid}
    parameters::Vector{T}
end

Source{T}(n, f, parameters, event = C_NULL) where {T} = Source{T, typeof(f)}(n, f, event, parameters)
vectors(::Source{T}) where {T} = Vector{T}

"The function `f(du, u, p, t)` that Julia source text defines; the last expression of the text must be it."
source_function(text::AbstractString) = Core.eval(Module(), Meta.parseall(text))

function ode_function(field::Source; mass_matrix = I, full = false)
    return full ? ODEFunction{true, FullSpecialize}(field.f; mass_matrix) : ODEFunction{true}(field.f; mass_matrix)
end
