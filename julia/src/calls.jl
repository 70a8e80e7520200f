# The doors for a caller that speaks C: functions by address, objects by number, failures as text.
#
# Each function returns 0 on failure, of which `failure` then has the text. Numbers and addresses are Int64.

"What the caller holds, by the numbers that it knows it by."
const HELD = Dict{Int64, Any}()
const COUNT = Ref{Int64}(0)
const FAILURE = Ref("")

function hold(@nospecialize(x))
    COUNT[] += 1
    HELD[COUNT[]] = x
    return COUNT[]
end

"Text of the last failure, zero-terminated, until the next one; empty where a callback gave up."
call_failure() = pointer(FAILURE[])

function failed(@nospecialize(error))
    # An error's text can name types of many thousand characters; what follows the first few lines helps nobody.
    text = error isa Abandoned ? "" : sprint(showerror, error)
    FAILURE[] = length(text) > 2000 ? first(text, 2000) * " ..." : text
    return Int64(0)
end

"A number type by its width in bits."
number_type(bits::Int64) = bits == 32 ? Float32 : Float64

"What `f` returns, or 0 where it fails."
function answer(f)
    return try
        f()
    catch error
        failed(error)
    end
end

"The same, with work going to where the field is."
answer(f, field::Field{T, V}) where {T, V} = answer(() -> at_place(f, V, field.place))
answer(f, field) = answer(f)

"Has the work of a field go to another stream from now on."
function call_stream(field::Int64, stream::Ptr{Cvoid})
    return answer() do
        f = HELD[field]
        f.place = Place(f.place.kind, f.place.device, stream)
        Int64(1)
    end
end

function call_field(bits::Int64, functions::Ptr{Functions})
    return answer() do
        hold(Field{number_type(bits)}(unsafe_load(functions)))
    end
end

function call_compiled_field(bits::Int64, functions::Ptr{CompiledFunctions})
    return answer() do
        hold(Field{number_type(bits)}(unsafe_load(functions)))
    end
end

"As [`prepare!`](@ref)."
function call_prepare(field::Int64)
    return answer() do
        prepare!(HELD[field])
        Int64(1)
    end
end

"The address of the C function that [`compile_packed`](@ref) makes."
function call_compile_packed(bits::Int64, text::Cstring)
    return answer() do
        Int64(UInt(compile_packed(number_type(bits), unsafe_string(text))))
    end
end

"The address of the C function that [`compile`](@ref) makes."
function call_compile(bits::Int64, text::Cstring)
    return answer() do
        Int64(UInt(compile(number_type(bits), unsafe_string(text))))
    end
end

"Of `m` parameters, which are copied, and with an event function or none."
function call_source(bits::Int64, n::Int64, f::Int64, p::Int64, m::Int64, event::Int64)
    return answer() do
        T = number_type(bits)
        hold(Source{T}(n, HELD[f], copy(Vector{T}(Lent(pointer_to(p), m))), pointer_to(event)))
    end
end

"Of the numbers of its parts, and with an event function or none."
function call_parts(stiff::Int64, other::Int64, event::Int64)
    return answer() do
        hold(Parts(HELD[stiff], HELD[other], pointer_to(event)))
    end
end

function call_source_function(text::Cstring)
    return answer() do
        hold(source_function(unsafe_string(text)))
    end
end

"`f(du, u, p, t)` once, between the addresses of `n` numbers and of `m` parameters."
function call_evaluate(bits::Int64, f::Int64, du::Int64, u::Int64, n::Int64, p::Int64, m::Int64, t::Float64)
    return answer() do
        at(address, length) = Vector{number_type(bits)}(Lent(pointer_to(address), length))
        HELD[f](at(du, n), at(u, n), at(p, m), t)
        Int64(1)
    end
end

function call_algorithm(text::Cstring)
    return answer() do
        hold(algorithm(unsafe_string(text)))
    end
end

"The number of a [`Solve`](@ref), which looks at the memory of the request for as long as it is held."
function call_solve(field::Int64, alg::Int64, request::Ptr{Request}, outcome::Ptr{Outcome})
    return answer(HELD[field]) do
        r = unsafe_load(request)
        prepare!(HELD[field])
        s, o = solve(HELD[field], HELD[alg], r)
        unsafe_store!(outcome, o)
        hold(s)
    end
end

"The number of what [`repeated`](@ref) makes, which does not look at the memory of the request afterwards."
function call_repeated(field::Int64, alg::Int64, request::Ptr{Request})
    return answer() do
        r = unsafe_load(request)
        hold(repeated(HELD[field], HELD[alg], r))
    end
end

"The number of a [`Solve`](@ref) where steps are kept, else 1."
function call_again(s::Int64, u0::Int64, out::Int64, outcome::Ptr{Outcome})
    return answer() do
        prepare!(HELD[s].field)
        kept, o = again!(HELD[s], u0, out)
        unsafe_store!(outcome, o)
        kept === nothing ? Int64(1) : hold(kept)
    end
end

"The systems of a sweep, each by itself; nothing is held afterwards."
function call_sweep(field::Int64, alg::Int64, request::Ptr{Request}, systems::Ptr{Systems}, outcome::Ptr{Outcome})
    return answer() do
        unsafe_store!(outcome, sweep(HELD[field], HELD[alg], unsafe_load(request), unsafe_load(systems)))
        Int64(1)
    end
end

"The number of a [`Swept`](@ref), which does not look at the memory of the request afterwards, where steps are kept, else 1."
function call_abreast(field::Int64, request::Ptr{Request}, systems::Ptr{Abreast}, outcome::Ptr{Outcome})
    return answer() do
        r = unsafe_load(request)
        swept, o = abreast(HELD[field], r, unsafe_load(systems))
        unsafe_store!(outcome, o)
        r.keep == 0 ? Int64(1) : hold(swept)
    end
end

"The calls of the field that a [`pull!`](@ref) took, and one."
function call_pull(swept::Int64, request::Ptr{PullRequest})
    return answer() do
        1 + Int64(pull!(HELD[swept], unsafe_load(request)))
    end
end

"""
The states of the systems of a [`Swept`](@ref) at `m` times, or `m` of each system: `length` times in all, to the address
`out`.
"""
function call_interpolate_all(swept::Int64, times::Int64, length::Int64, out::Int64, m::Int64)
    return answer() do
        at = reshape(Vector{Float64}(Lent(pointer_to(times), length)), m, :)
        interpolate_to!(HELD[swept], copy(at), out, m)
        Int64(1)
    end
end

function interpolate_to!(swept::Swept{T}, times, out, m) where {T}
    n, count = swept.field.n, size(swept.values, 2)
    return interpolate!(swept, times, reshape(Vector{T}(Lent(pointer_to(out), n * count * m)), n, count, m))
end

function call_interpolate(s::Int64, times::Int64, out::Int64, m::Int64)
    return answer(HELD[s].field) do
        interpolate!(HELD[s], times, out, m)
        Int64(1)
    end
end

function call_adjoint(s::Int64, name::Cstring, alg::Int64, request::Ptr{AdjointRequest}, outcome::Ptr{Outcome})
    return answer(HELD[s].field) do
        prepare!(HELD[s].field)
        given = HELD[s], HELD[alg], unsafe_load(request)
        o = of_mass(HELD[s]) ? mass_adjoint!(given...) : adjoint!(HELD[s], unsafe_string(name), HELD[alg], unsafe_load(request))
        unsafe_store!(outcome, o)
        Int64(1)
    end
end

"""
As [`replay!`](@ref), to the address `both`: of the gradient by the first state, and then of that by the parameters. `g`
is the address of the cotangents. What the request says of these does not count.
"""
function call_replay(
        s::Int64, request::Ptr{ReplayRequest}, both::Int64, g::Int64, whole::Int64, replayed::Ptr{Replayed}
    )
    return answer(HELD[s].field) do
        prepare!(HELD[s].field)
        r = unsafe_load(request)
        unsafe_store!(replayed, replay!(HELD[s], filled(r, HELD[s].field, both, g); whole = whole != 0))
        Int64(1)
    end
end

function filled(r::ReplayRequest, field::Union{Field{T}, Parts{T}}, both, g) where {T}
    n, address = field.n, pointer_to(both)
    of_start, of_parameters = Lent(address, n), Lent(address + n * sizeof(T), length(field.parameters))
    cotangents = Lent(pointer_to(g), n * r.times.length)
    return ReplayRequest(of_start, of_parameters, cotangents, r.times, r.a, r.c, r.p, r.stages, r.atol)
end

function call_release(numbers::Ptr{Int64}, count::Int64)
    for i in 1:count
        recycle!(pop!(HELD, unsafe_load(numbers, i), nothing))
    end
    return Int64(1)
end

"Lets Julia collect its garbage, or not, from now on; returns whether it did until now."
call_collect(on::Int64) = Int64(GC.enable(on != 0))

"The addresses of the above, and of [`DONE`](@ref), as text: `name=address`, one after the other."
function addresses()
    functions = (;
        done = Base.unsafe_convert(Ptr{Int64}, DONE),
        failure = @cfunction(call_failure, Ptr{UInt8}, ()),
        field = @cfunction(call_field, Int64, (Int64, Ptr{Functions})),
        stream = @cfunction(call_stream, Int64, (Int64, Ptr{Cvoid})),
        compiled_field = @cfunction(call_compiled_field, Int64, (Int64, Ptr{CompiledFunctions})),
        prepare = @cfunction(call_prepare, Int64, (Int64,)),
        compile = @cfunction(call_compile, Int64, (Int64, Cstring)),
        compile_packed = @cfunction(call_compile_packed, Int64, (Int64, Cstring)),
        abreast = @cfunction(call_abreast, Int64, (Int64, Ptr{Request}, Ptr{Abreast}, Ptr{Outcome})),
        pull = @cfunction(call_pull, Int64, (Int64, Ptr{PullRequest})),
        source = @cfunction(call_source, Int64, (Int64, Int64, Int64, Int64, Int64, Int64)),
        parts = @cfunction(call_parts, Int64, (Int64, Int64, Int64)),
        source_function = @cfunction(call_source_function, Int64, (Cstring,)),
        evaluate = @cfunction(call_evaluate, Int64, (Int64, Int64, Int64, Int64, Int64, Int64, Int64, Float64)),
        algorithm = @cfunction(call_algorithm, Int64, (Cstring,)),
        solve = @cfunction(call_solve, Int64, (Int64, Int64, Ptr{Request}, Ptr{Outcome})),
        repeated = @cfunction(call_repeated, Int64, (Int64, Int64, Ptr{Request})),
        again = @cfunction(call_again, Int64, (Int64, Int64, Int64, Ptr{Outcome})),
        sweep = @cfunction(call_sweep, Int64, (Int64, Int64, Ptr{Request}, Ptr{Systems}, Ptr{Outcome})),
        interpolate = @cfunction(call_interpolate, Int64, (Int64, Int64, Int64, Int64)),
        interpolate_all = @cfunction(call_interpolate_all, Int64, (Int64, Int64, Int64, Int64, Int64)),
        adjoint = @cfunction(call_adjoint, Int64, (Int64, Cstring, Int64, Ptr{AdjointRequest}, Ptr{Outcome})),
        replay = @cfunction(
            call_replay, Int64, (Int64, Ptr{ReplayRequest}, Int64, Int64, Int64, Ptr{Replayed})
        ),
        release = @cfunction(call_release, Int64, (Ptr{Int64}, Int64)),
        collect = @cfunction(call_collect, Int64, (Int64,)),
    )
    return join(("$name=$(UInt(address))" for (name, address) in pairs(functions)), " ")
end
