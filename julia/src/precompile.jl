# What Python will call, compiled ahead for both precisions: loading the package is then all that a first solve waits for.

# A linear field in plain C calling convention, in both precisions, as Python's callbacks are.
for T in (Float32, Float64)
    @eval begin
        function c_field(du::Ptr{$T}, u::Ptr{$T}, t::Cdouble)
            unsafe_store!(du, -unsafe_load(u))
            return done!()
        end
        function c_vjp(out::Ptr{$T}, v::Ptr{$T}, u::Ptr{$T}, t::Cdouble)
            unsafe_store!(out, -unsafe_load(v))
            return done!()
        end
        function c_margin(margin::Ptr{Cdouble}, u::Ptr{$T}, t::Cdouble)
            unsafe_store!(margin, Cdouble(unsafe_load(u)) - 0.5)
            return done!()
        end
        c_jacobian(J::Ptr{$T}, u::Ptr{$T}, t::Cdouble) = (unsafe_store!(J, -one($T)); done!())
        c_zero(dT::Ptr{$T}, u::Ptr{$T}, t::Cdouble) = (unsafe_store!(dT, zero($T)); done!())
        # The Jacobian of -u is -1, and what multiplies -1 by a vector does so at v = 1.
        function linear_field(::Type{$T}; event::Bool = false)
            vjp = @cfunction(c_vjp, Cvoid, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Cdouble))
            return Functions(
                1, 1, 0, 0, C_NULL,
                @cfunction(c_field, Cvoid, (Ptr{$T}, Ptr{$T}, Cdouble)),
                @cfunction(c_jacobian, Cvoid, (Ptr{$T}, Ptr{$T}, Cdouble)),
                @cfunction(c_zero, Cvoid, (Ptr{$T}, Ptr{$T}, Cdouble)),
                vjp, vjp, vjp,
                event ? @cfunction(c_margin, Cvoid, (Ptr{Cdouble}, Ptr{$T}, Cdouble)) : C_NULL,
            )
        end
    end
end

address(a::Array) = Int64(UInt(pointer(a)))

"""
Solve u' = -u, u(0) = 1 over [0, 1] through the doors that Python comes by, and hand the number of the solve, the output
times and the states there to `after`; or u' = -u - u, of which each term is a part.
"""
function solve_linear(
        after, ::Type{T}, text; dense = false, keep = false, event = false, first_step = 0.0, tolerances = 1, mass = T[],
        split = false
    ) where {T}
    u0, times, out = ones(T, 1), event ? [0.0, 1.0] : [0.0, 0.5, 1.0], zeros(T, event ? 2 : 3)
    offsets, rtol, atol = [0, 1], fill(1.0e-4, tolerances), fill(1.0e-6, tolerances)
    field, outcome = [linear_field(T; event)], Vector{Outcome}(undef, 1)
    GC.@preserve u0 times out offsets rtol atol mass field outcome text begin
        request = [
            structure(
                Request; u0, out, times, offsets, rtol, atol, mass, first_step, dense, keep, max_step = Inf,
                max_steps = 1000
            ),
        ]
        GC.@preserve request begin
            alg = call_algorithm(Cstring(pointer(text)))
            f = call_field(8 * sizeof(T), pointer(field))
            numbers = [alg, f]
            if split
                push!(numbers, call_field(8 * sizeof(T), pointer(field)))
                f = push!(numbers, call_parts(numbers[2], numbers[3], 0))[end]
            end
            s = call_solve(f, alg, pointer(request), pointer(outcome))
            s == 0 && error(FAILURE[])
            after(s, alg, times, out)
            push!(numbers, s)
            call_release(pointer(numbers), length(numbers))
        end
    end
    return out
end

"The gradient of half the sum of squares at the outputs of a linear problem, perhaps with a mass matrix."
function adjoint_linear(::Type{T}, name, text; mass = T[]) where {T}
    du0, dp, slopes = zeros(T, 1), zeros(T, 1 + length(mass)), zeros(T, 3length(mass))
    rtol, atol, outcome = [1.0e-4], [1.0e-6], Vector{Outcome}(undef, 1)
    solve_linear(T, text; dense = true, mass) do s, alg, times, out
        GC.@preserve du0 dp slopes rtol atol name outcome begin
            request = [
                structure(
                    AdjointRequest; du0, dp, slopes, g = out, times, rtol, atol, max_step = Inf, max_steps = 1000
                ),
            ]
            GC.@preserve request begin
                done = call_adjoint(s, Cstring(pointer(name)), alg, pointer(request), pointer(outcome))
                done == 0 && error(FAILURE[])
            end
        end
    end
    return du0
end

solve_linear(::Type{T}, text; kwargs...) where {T} = solve_linear(Returns(nothing), T, text; kwargs...)

# The same, as a compiled function is called.
function c_compiled(
        out::Ptr{Float64}, v::Ptr{Float64}, u::Ptr{Float64}, p::Ptr{Float64}, c::Ptr{Float64}, w::Ptr{Float64}, t::Cdouble
    )
    unsafe_store!(out, -unsafe_load(u))
    return nothing
end

"Two systems u' = -u, u(0) = 1, over [0, 1] in one sweep, and then the first by itself: their states, and its."
function sweep_linear(text)
    u0, times, out, alone, slopes = ones(2), [0.0, 1.0], zeros(4), zeros(2), zeros(2)
    rtol, atol = [1.0e-4], [1.0e-6]
    f = @cfunction(
        c_compiled, Cvoid,
        (Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Cdouble)
    )
    functions = [structure(CompiledFunctions; n = 1, f)]
    systems, outcome = [structure(Systems; count = 2, slopes)], Vector{Outcome}(undef, 1)
    GC.@preserve u0 times out alone slopes rtol atol functions systems outcome text begin
        request = [structure(Request; u0, out, times, rtol, atol, max_step = Inf, max_steps = 1000)]
        GC.@preserve request begin
            alg = call_algorithm(Cstring(pointer(text)))
            field = call_compiled_field(64, pointer(functions))
            done = call_sweep(field, alg, pointer(request), pointer(systems), pointer(outcome))
            done == 0 && error(FAILURE[])
            repeated = call_repeated(field, alg, pointer(request))
            again = call_again(repeated, address(u0), address(alone), pointer(outcome))
            again == 0 && error(FAILURE[])
            numbers = [alg, field, repeated]
            call_release(pointer(numbers), 3)
        end
    end
    return out, alone
end

for T in (Float32, Float64)
    @eval begin
        function c_first(
                out::Ptr{$T}, v::Ptr{$T}, u::Ptr{$T}, p::Ptr{$T}, c::Ptr{$T}, w::Ptr{$T}, t::Cdouble
            )
            unsafe_store!(out, -unsafe_load(v))
            return nothing
        end
        function first_decays(::Type{$T}, n)
            f = @cfunction(
                c_first, Cvoid, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Cdouble)
            )
            return structure(CompiledFunctions; n, f, vjp = f)
        end
    end
end

# Heun's method: enough to compile for all.
const HEUN = (;
    a = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5, 0.5, 0.0], c = [0.0, 1.0, 1.0], p = [1.0, -0.5, 0.0, 0.5, 0.0, 0.0],
    e = [-0.5, 0.5, 0.0],
)

"""
Numbers of which the first decays, by our own loop, at the times 0, 1/2 and 1; and the gradient of the sum of that number
there by the first of the start.
"""
function alone_linear(::Type{T}, n; keep = 1) where {T}
    u0, times, out, both, g = ones(T, n), [0.0, 0.5, 1.0], zeros(T, 3n), zeros(T, n), zeros(T, 3n)
    g[1:n:end] .= 1
    rtol, atol, control = [1.0e-4], [1.0e-6], (; beta1 = 0.4, beta2 = 0.1, gamma = 0.9, qmin = 0.2, qmax = 10.0)
    functions, outcome, replayed = [first_decays(T, n)], Vector{Outcome}(undef, 1), Vector{Replayed}(undef, 1)
    GC.@preserve u0 times out both g rtol atol functions outcome replayed begin
        request = [
            structure(
                Request; u0, times, out, rtol, atol, control..., max_step = Inf, max_steps = 1000, keep, HEUN...,
                stages = 2, order = 2
            ),
        ]
        pulled = [structure(ReplayRequest; times)]
        GC.@preserve request pulled begin
            alg = call_algorithm(Cstring(pointer("Heun()")))
            field = call_compiled_field(8 * sizeof(T), pointer(functions))
            s = call_solve(field, alg, pointer(request), pointer(outcome))
            repeated = call_repeated(field, alg, pointer(request))
            kept = call_again(repeated, address(u0), address(out), pointer(outcome))
            done = call_replay(kept, pointer(pulled), address(both), address(g), 1, pointer(replayed))
            0 in (s, repeated, kept, done) && error(FAILURE[])
            numbers = [alg, field, s, repeated, kept]
            call_release(pointer(numbers), 5)
        end
    end
    return out, both
end

# The same, for eight systems at once: minus the state, or minus `v` where that is another; the Jacobian; nothing; and the
# state less a half.
for T in (Float32, Float64)
    @eval begin
        function c_scalar(
                out::Ptr{$T}, v::Ptr{$T}, u::Ptr{$T}, p::Ptr{$T}, c::Ptr{$T}, w::Ptr{$T}, t::Cdouble
            )
            unsafe_store!(out, -unsafe_load(u))
            return nothing
        end
    end
    for (name, value) in (
            (:c_packed, :(-PackNumbers(v)[1])), (:c_packed_jacobian, :(-one($T))), (:c_packed_zero, :(zero($T))),
            (:c_packed_event, :(PackNumbers(u)[1] - $T(0.7))),
        )
        @eval function $name(
                out::Ptr{$T}, v::Ptr{$T}, u::Ptr{$T}, p::Ptr{$T}, c::Ptr{$T}, w::Ptr{$T}, t::Ptr{$T}
            )
            PackNumbers(out)[1] = $value
            return nothing
        end
    end
    @eval function packed_functions(::Type{$T})
        return (;
            scalar = @cfunction(
                c_scalar, Cvoid, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Cdouble)
            ),
            f = @cfunction(c_packed, Cvoid, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T})),
            jac = @cfunction(c_packed_jacobian, Cvoid, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T})),
            zero = @cfunction(c_packed_zero, Cvoid, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T})),
            event = @cfunction(c_packed_event, Cvoid, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T})),
        )
    end
end

"""
Ten systems u' = -u, u(0) = 1, over [0, 1], abreast, and the gradient by their starts of the sum of what they come to at
1/2 and 1: by Heun's method, or by a Rosenbrock method of one stage; or the times where they come to 0.7.
"""
function abreast_linear(::Type{T}; implicit = false, ends = false, tolerances = 1) where {T}
    count, (; scalar, f, jac, zero, event) = 10, packed_functions(T)
    points = ends ? 2 : 3
    du0, dt, inside = zeros(T, count), zeros(points * count), zeros(T, count)
    u0, times, out, slopes = ones(T, count), ends ? [0.0, 1.0] : [0.0, 0.5, 1.0], zeros(T, points * count), zeros(T, count)
    rtol, atol, g = fill(1.0e-4, tolerances), fill(1.0e-6, tolerances), ones(T, points * count)
    counts, reached = [zeros(Int64, count) for _ in 1:3], zeros(2count)
    functions = [structure(CompiledFunctions; n = 1, f = scalar)]
    (; a, c, p, e) = HEUN
    b, d, gammas = [1.0], [0.0], [1.0]
    if implicit
        a, c, p, e = [0.0], [0.0], ones(1), [1.0e-3]
    end
    naccept, nreject, codes = counts
    event_times, event_slopes, event_margins = fill(NaN, count), zeros(T, count), zeros(T, 2count)
    at, event_numbers = [0.25], zeros(T, 1)
    control = (; beta1 = 0.4, beta2 = 0.1, gamma = 0.9, qmin = 0.2, qmax = 10.0)
    arrays = (;
        u0, times, out, slopes, rtol, atol, g, du0, dt, reached, a, c, p, e, b, d, gammas, naccept, nreject, codes,
        event_times, event_slopes, event_margins, event_numbers, at, inside,
    )
    outcome = Vector{Outcome}(undef, 1)
    GC.@preserve arrays functions outcome begin
        request = [
            structure(
                Request; u0, out, times, rtol, atol, max_step = Inf, max_steps = 1000, keep = 1, control...
            ),
        ]
        own = implicit ? (; b, d, gammas, gamma = 1.0, jac, tgrad = zero) : (;)
        watch = (; event, margins = 1, direction = 1, event_times, event_slopes, event_margins, event_numbers)
        systems = [
            structure(
                Abreast; count, slopes, f, a, c, p, e, stages = length(c) - !implicit, order = 2, naccept, nreject, codes,
                ends = reached, own..., (ends ? watch : (;))...
            ),
        ]
        GC.@preserve request systems begin
            field = call_compiled_field(8 * sizeof(T), pointer(functions))
            swept = call_abreast(field, pointer(request), pointer(systems), pointer(outcome))
            swept == 0 && error(FAILURE[])
            pulled = [structure(PullRequest; du0, g, dt, states = out, pull = f, bend = zero)]
            GC.@preserve pulled call_pull(swept, pointer(pulled)) == 0 && error(FAILURE[])
            call_interpolate_all(swept, address(at), 1, address(inside), 1) == 0 && error(FAILURE[])
            numbers = [field, swept]
            call_release(pointer(numbers), 2)
        end
    end
    return (; out, du0, inside, event_times)
end

"The gradient of half the sum of squares at the outputs of a linear problem, by taking its steps again."
function replay_linear(::Type{T}, text; keep = 1) where {T}
    both, c = zeros(T, 2), [0.0, 1.0]  # Euler's method is enough to compile for all
    a, p = [0.0, 0.0, 1.0, 0.0], [1.0, 0.0]
    solve_linear(T, text; keep) do s, alg, times, out
        replayed = Vector{Replayed}(undef, 1)
        GC.@preserve both c a p times out replayed begin
            request = [structure(ReplayRequest; times, a, c, p, stages = 1)]
            GC.@preserve request begin
                done = call_replay(s, pointer(request), address(both), address(out), 1, pointer(replayed))
                done == 0 && error(FAILURE[])
            end
        end
    end
    return both
end

"The same of a field of two parts; the trapezoidal rule is enough to compile for all."
function replay_split(::Type{T}, text) where {T}
    both, c, a = zeros(T, 3), [0.0, 1.0], [0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 1.0, 0.0]
    solve_linear(T, text; keep = 1, split = true) do s, alg, times, out
        replayed = Vector{Replayed}(undef, 1)
        GC.@preserve both c a times out replayed begin
            request = [structure(ReplayRequest; times, a, c, stages = 2)]
            GC.@preserve request begin
                done = call_replay(s, pointer(request), address(both), address(out), 1, pointer(replayed))
                done == 0 && error(FAILURE[])
            end
        end
    end
    return both
end

"Products of all forms and sizes, as compiled functions ask for them."
function multiply_all(::Type{T}) where {T}
    x, out, layer = ones(T, 1_100_000), zeros(T, 10_000), Layer(1, 0, 2, 2, 2, 0)
    GC.@preserve x out begin
        a, to = Numbers(pointer(x)), Numbers(pointer(out))
        for (m, n, k) in ((9, 9, 9), (2, 2, 9), (1, 1, 1), (70, 70, 70), (1, 1030, 1030)), start in (nothing, Start(a, 0, One()), Start(a, 1, 0))
            multiply!(to, m, n, k, a, k, 1, a, n, 1, start)
            multiply!(to, m, n, k, a, 1, m, a, 1, k, start)
        end
        transpose!(to, a, layer.rows, layer.columns, layer.step)
    end
    return out[1]
end

const IMPLICIT = (
    "Rosenbrock23()", "Rodas5P()", "RadauIIA5()", "QNDF()", "KenCarp4()", "KenCarp5()", "Kvaerno5()", "TRBDF2()", "DefaultODEAlgorithm()",
)

@setup_workload begin
    @compile_workload begin
        addresses()
        call_collect(1)
        multiply_all(Float32)
        multiply_all(Float64)
        for text in ("DP5()", "Tsit5()"), T in (Float32, Float64)
            solve_linear(T, text; dense = true) do s, alg, times, out
                call_interpolate(s, address(times), address(out), length(times))
            end
            replay_linear(T, text)
            T == Float64 && replay_linear(T, text; keep = 2)
            T == Float64 && solve_linear(T, text; first_step = 0.1)
            T == Float64 && solve_linear(T, text; event = true)
        end
        for text in ("DP5()", "Tsit5()")
            sweep_linear(text)
        end
        for T in (Float32, Float64), n in (1, 9), keep in (1, 2)
            alone_linear(T, n; keep)
        end
        for T in (Float32, Float64), A in (Numbers{T}, PackNumbers{T})
            precompile(run!, (Alone{T, Direct{T}, A}, Ptr{T}, Ptr{T}))
            precompile(again!, (Alone{T, Direct{T}, A}, Int64, Int64))
            precompile(back!, (Retaken{T, Direct{T}, Direct{T}, A}, Trail{T}, Vector{Float64}, Matrix{T}, Vector{T}))
        end
        for T in (Float32, Float64), implicit in (false, true), ends in (false, true)
            abreast_linear(T; implicit, ends)
        end
        for text in ("BS3()", "DP8()", "Vern7()", "Vern9()", IMPLICIT...)
            solve_linear(Float64, text; dense = true)
        end
        for text in ("Rodas5P()", "RadauIIA5()")
            adjoint_linear(Float64, "gauss", text; mass = ones(1))
        end
        for text in ("KenCarp4()", "KenCarp5()")
            solve_linear(Float64, text; dense = true, split = true)
            replay_split(Float64, text)
        end
        solve_linear(Float64, "QNDF()"; dense = true, mass = ones(1))  # its dense output is too rough for an adjoint
    end
end
